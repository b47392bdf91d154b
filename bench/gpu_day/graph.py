"""CUDA graphs: the tests of capture and replay, a cold capture, and one step again and again."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import torch

import baton_kernels
from baton_kernels.testing import assert_same_bits, int32

from .device import Stage, run

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM = 32, 8, 128


class Step:
    """A decode step of some layers: append with rotary, attention, a norm, a projection.

    Args:
        device: "cuda" or "cpu".
        dtype: of everything.
        rows: of the batch; their lengths differ.
        capacity: columns of a slot.
    """

    def __init__(self, device: str, dtype: torch.dtype, rows: int, capacity: int):
        torch.manual_seed(0)
        like = {"device": device, "dtype": dtype}
        self.lengths = [1 + (row * 977) % (capacity - 1) for row in range(rows)]
        self.caches = [torch.randn(rows, KV_HEADS, capacity, DIM, **like) for _ in range(2)]
        self.query = torch.randn(rows, HEADS, DIM, **like)
        self.key, self.value = (torch.randn(rows, KV_HEADS, DIM, **like) for _ in range(2))
        self.weight = torch.randn(HEADS * DIM, HEADS * DIM, **like) / DIM
        angle = torch.rand(rows, DIM // 2, device=device)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.slots = int32(range(rows), device)
        self.columns = int32([n - 1 for n in self.lengths], device)
        self.bounds = int32(range(rows + 1), device)
        self.starts = int32([0] * rows, device)
        self.rows = int32(self.lengths, device)

    def run(self) -> torch.Tensor:
        """What a captured step computes."""
        query = baton_kernels.append_kv(
            self.key, self.value, *self.caches, self.slots, self.columns, query=self.query,
            cos=self.cos, sin=self.sin,
        )  # fmt: skip
        out = baton_kernels.ragged_attention(
            query,
            *self.caches,
            self.bounds,
            self.slots,
            self.starts,
            self.rows,
            max_query_length=1,
        ).flatten(1)
        out = baton_kernels.rms_norm(out, self.weight[0], 1e-6)
        return baton_kernels.linear(out, self.weight)


def make(stage: Stage) -> Step:
    return Step(stage.device, stage.dtype, stage.pick(32, 3), stage.pick(2048, 40))


def busy(stage: Stage, stop: threading.Event) -> None:
    """Keeps the device busy on another stream."""
    size = stage.pick(4096, 64)
    stream = torch.cuda.Stream() if stage.device == "cuda" else None
    a = torch.randn(size, size, device=stage.device, dtype=stage.dtype)
    with torch.inference_mode(), torch.cuda.stream(stream):
        while not stop.is_set():
            for _ in range(4):
                a @ a
            if stream is not None:
                stream.synchronize()


def repeat(stage: Stage) -> int:
    """The same step many times next to other work; how many, all with the same bits.

    Raises:
        AssertionError: Some bits differ.
    """
    step = make(stage)
    expected = step.run().clone()
    stage.synchronize()
    stop = threading.Event()
    thread = threading.Thread(target=busy, args=(stage, stop), daemon=True)
    thread.start()
    count = 0
    try:
        for count in range(1, stage.pick(500, 8) + 1):
            assert_same_bits(step.run(), expected, f"step {count}")
            if stage.record.seconds_left < 1:
                break
    finally:
        stop.set()
        thread.join()
    return count


def cold_capture() -> None:
    """A step that is captured before any kernel has run in this process."""
    step = Step("cuda", torch.bfloat16, 32, 2048)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        result = step.run()
    graph.replay()
    with torch.inference_mode():
        assert_same_bits(result, step.run(), "replay of a cold capture against a call")
    print("a cold capture gives the bits of a call")


@torch.inference_mode()
def graph(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    if record.wants("one step again and again"):
        with record.attempt("one step again and again"):
            record.add("one step again and again", equal=repeat(stage))
    commands = {}
    if stage.device == "cuda":
        files = [
            str(path)
            for path in (ROOT / "tests").rglob("test_*.py")
            if path.name in ("test_cuda_graph.py", "test_relay_exactness.py")
        ]
        commands["cold capture"] = [sys.executable, "-m", "bench.gpu_day.graph", "--cold"]
        commands["tests of graphs and of the relay"] = [
            sys.executable, "-m", "pytest", "-q", "--tb=short", "-k", "test_gpu", *files,
        ]  # fmt: skip
    for name, command in commands.items():
        if not record.wants(name, 2.0):
            continue
        with record.attempt(name):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(2.0, record.seconds_left)
            )
            print(done.stdout, done.stderr)
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            wrong = {} if done.returncode == 0 else {"error": f"ended with {done.returncode}"}
            record.add(name, last_line="".join(last), **wrong)
    record.headline = "; ".join(
        f"{row['case']}: {row.get('error') or row.get('last_line') or row.get('equal')}"
        for row in record.rows
    )


if __name__ == "__main__":
    if "--cold" in sys.argv:
        cold_capture()
    else:
        run(graph)
