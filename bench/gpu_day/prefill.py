"""Whole prompts as CUDA graphs, compared with FlashAttention-3 and torch's backends.

On compute capability 9.0 the warpgroup kernel comes last: no GPU has run it yet, and should it hang
or fault, what was measured before is on disk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from baton_kernels import ragged_attention

from ..kernels.attention_work import AttentionWork
from ..kernels.cuda_peers import prefill_peers
from ..kernels.measure import OURS, Way
from .decode import LLAMA, Sizes
from .device import Stage, run
from .timing import beside_peers, our_us, time_ways


def by_kernel(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with the kernel that BATON_PREFILL names so."""

    @functools.wraps(call)
    def run() -> object:
        os.environ["BATON_PREFILL"] = name
        try:
            return call()
        finally:
            del os.environ["BATON_PREFILL"]

    return run


def has_warpgroups(stage: Stage) -> bool:
    return stage.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@torch.inference_mode()
def prefill(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    sizes = Sizes(stage)
    # A matrix product reads its operands from the cache in any case, so two layers are enough.
    sizes.cache_bytes = 1
    shapes = stage.pick(((1, 2048), (1, 8192), (1, 512), (8, 512)), ((1, 24), (2, 7)))
    cases = [(*shape, False) for shape in shapes]
    cases += [(*shape, True) for shape in shapes if has_warpgroups(stage)]
    for rows, tokens, warpgroups in cases:
        label = f"{rows} x {tokens} tokens, {LLAMA}" + (", wgmma" if warpgroups else "")
        if not record.wants(label, 4.0):
            continue
        with record.attempt(label):
            work = AttentionWork(
                LLAMA, [tokens] * rows, [tokens] * rows, dtype=stage.dtype, device=sizes
            )
            ours = Way(
                "ragged_attention", work.calls(ragged_attention), work.check, OURS,
                work.poison_padding,
            )  # fmt: skip
            if warpgroups:
                # Compared with the other two kernels, in turns.
                peers = [
                    Way(name, [by_kernel(name, call) for call in ours.calls], ours.check,
                        reset=ours.reset)
                    for name in ("mma", "mma32")
                ]  # fmt: skip
                ours.calls = [by_kernel("wgmma", call) for call in ours.calls]
            else:
                peers = prefill_peers(work) if stage.device == "cuda" else []
            found = time_ways([ours, *peers], stage.device)
            us = our_us(found)
            record.add(
                label, flops=work.flops, ways=found, tflop_per_s=us and work.flops / us / 1e6,
                beside=beside_peers(found),
            )  # fmt: skip
    rows = [row for row in record.rows if row.get("tflop_per_s")]
    record.headline = "; ".join(f"{row['case']}: {row['tflop_per_s']:.4g} TFLOP/s" for row in rows)
    record.lines = [f"{row['case']}: {row['beside']}" for row in rows]


if __name__ == "__main__":
    run(prefill)
