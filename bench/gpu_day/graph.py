"""CUDA graphs: the tests of capture and replay, a cold capture, one step many times, and a relay
with and without graphs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

import baton_kernels
from baton_engines import Relay, policies
from baton_engines.testing.recorded_graphs import RecordedGraphs
from baton_kernels.testing import assert_same_bits, int32

from .device import Stage, run
from .relay import make_model

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM = 32, 8, 128
# Files with tests that only a GPU can run, besides the ops' own.
GPU_TESTS = (
    "test_cuda_graph.py", "test_cuda_library.py", "test_graphs.py", "test_graph_steps.py",
    "test_relay_exactness.py", "test_two_gpus.py",
)  # fmt: skip


class Step:
    """A decode step of some layers: append with rotary embedding, attention, a norm, a projection.

    Args:
        device: "cuda" or "cpu".
        dtype: of all tensors.
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
        """The computation that is captured."""
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


@torch.inference_mode()
def repeat(stage: Stage) -> int:
    """Repeats a step next to other work and returns how often; all results had the same bits.

    Raises:
        AssertionError: some bits differ.
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


def answers(stage: Stage, model: Any, graphs: Any) -> tuple[dict[int, list[torch.Tensor]], int]:
    """Logits of queries that arrive, leave, pause and move, and how many steps were replayed."""
    logits: dict[int, list[torch.Tensor]] = {}
    count, slots = stage.pick((40, 12), (6, 3))
    costs = policies.get("baton", costs=lambda work: 1e-3 * (10 + work.tokens))
    with Relay(model, slots, 300, costs, cuda_graphs=graphs) as relay:
        relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(row)
        for number in range(count):
            prompt = [(31 * number + 7 * i) % 131 for i in range(1 + 23 * number % 200)]
            relay.submit(prompt, max_new_tokens=8 + number, eos=None)
        parked = None
        for step in range(10**6):
            if step == 5:
                parked = relay.running[0]
                relay.preempt(parked)
            elif step == 9:
                relay.resume(parked)
                relay.resize(slots + 4)
            if not relay.step():
                break
        return logits, relay.counters.replayed_steps


def relay_with_graphs(stage: Stage) -> dict[str, int]:
    """A small relay with and without graphs: the bits are equal, and torch sees no wait for the
    device.

    Raises:
        AssertionError: some bits differ, or no step was replayed.
    """
    model = make_model(stage, "tiny")
    graphs = True if stage.device == "cuda" else RecordedGraphs()
    found, replayed = answers(stage, model, graphs)
    expected, _ = answers(stage, model, False)
    assert replayed and found.keys() == expected.keys(), (replayed, len(found), len(expected))
    for id, rows in expected.items():
        for one, other in zip(found[id], rows, strict=True):
            assert_same_bits(one, other, f"query {id}")
    return {"replayed_steps": replayed, "equal_logits": sum(map(len, expected.values()))}


def waits_of_a_step(stage: Stage) -> None:
    """A replayed step while torch reports every wait of the host.

    Raises:
        RuntimeError: something waits for the device, other than for the event of the step itself.
    """
    with Relay(make_model(stage, "tiny"), 4, 64) as relay:
        relay.submit([1, 2, 3], max_new_tokens=9, eos=None)
        for _ in range(3):
            relay.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            relay.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


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


def result_of(row: dict[str, Any]) -> Any:
    """The result of a case as one word."""
    return next(
        (row[key] for key in ("error", "last_line", "equal", "equal_logits") if row.get(key)), None
    )


def graph(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    if record.wants("one step again and again"):
        with record.attempt("one step again and again"):
            record.add("one step again and again", equal=repeat(stage))
    if record.wants("a relay with graphs", 2.0):
        with record.attempt("a relay with graphs"):
            record.add("a relay with graphs", **relay_with_graphs(stage))
    if stage.device == "cuda" and record.wants("waits of a replayed step"):
        with record.attempt("waits of a replayed step"):
            waits_of_a_step(stage)
            record.add("waits of a replayed step", equal="one event")
    commands = {}
    if stage.device == "cuda":
        files = [
            str(path) for path in (ROOT / "tests").rglob("test_*.py") if path.name in GPU_TESTS
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
    record.headline = "; ".join(f"{row['case']}: {result_of(row)}" for row in record.rows)


if __name__ == "__main__":
    if "--cold" in sys.argv:
        cold_capture()
    else:
        run(graph)
