"""The device's properties and highest rates, and each op once compared with its reference."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

import baton_kernels

from .. import cpu_name
from .device import Stage, run
from .rates import rates
from .small_calls import calls, compare

PACKAGES = ("torch", "triton", "transformers", "fa3_fwd", "flashinfer-python", "numpy")


def about(device: str) -> dict[str, Any]:
    """Device, driver and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    found = {"versions": versions, "host": cpu_name(), "build": baton_kernels.build_info()}
    if device == "cpu":
        return {"name": cpu_name(), **found}
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        driver = str(error)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability()),
        "driver": driver.splitlines(),
        **found,
    }


@torch.inference_mode()
def probe(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    if record.wants("about"):
        record.add("about", **about(stage.device))
        why_not = baton_kernels.build_info()["cuda"]["why_not"]
        if stage.device == "cuda" and why_not:
            record.add("the CUDA library", error=why_not)
    wrong = 0
    for name, make in calls(stage.device):
        if not record.wants(name):
            continue
        with record.attempt(name):
            compare(*make())
            record.add(name, right=True)
    # After the ops: a rate can be measured again, but whether the ops are right must be known
    # first.
    if record.wants("rates"):
        with record.attempt("rates"):
            record.add("rates", **rates(stage))
    named = {row["case"]: row for row in record.rows}
    wrong = len([case for case in record.errors if case not in ("rates", "about")])
    right = sum(bool(row.get("right")) for row in record.rows)
    record.headline = f"{named['about'].get('name')}: {right} calls right, {wrong} wrong"
    found = named.get("rates", {})
    if "read_by" in found:
        record.lines = [
            f"read {found['read_gb_per_s']:.0f} GB/s ({found['read_by']}), copy "
            f"{found['copy_gb_per_s']:.0f} GB/s, GEMM {found['gemm_tflop_per_s']:.1f} TFLOP/s, "
            f"launch {found['launch_us']:.1f} us, graph node {found['graph_node_us']:.2f} us"
        ]


if __name__ == "__main__":
    run(probe)
