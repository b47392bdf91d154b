"""Times several ways to do the same work in turns, each as a CUDA graph of calls on cold data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels.measure import Way, describe, refused


class Replay:
    """Calls that run one after the other: captured on a GPU, called directly on a CPU.

    Args:
        calls: each on its own data, which together exceed the L2 cache.
        device: "cuda" or "cpu".

    Attributes:
        captured: whether it is a graph; the host launches a peer that cannot be captured.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: str):
        self.calls, self.device = calls, device
        self.captured = False
        self._graph = None
        if device == "cuda":
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Kernels are loaded and workspaces created before a capture, during which neither is
        # allowed.
        with torch.cuda.stream(stream):
            for call in self.calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                # Results stay in the graph's own memory pool as long as it exists.
                self._results = [call() for call in self.calls]
        except Exception as error:
            torch.cuda.synchronize()
            print(f"not captured: {describe(error)}")
            return
        self._graph, self.captured = graph, True

    def run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self.calls:
            call()

    def seconds(self) -> float:
        """The time of one call, in one replay of all."""
        if self.device == "cpu":
            begin = time.perf_counter()
            self.run()
            return (time.perf_counter() - begin) / len(self.calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not self.captured:
            # The device waits until the host is ahead of it; see bench.kernels.cuda.
            torch.cuda._sleep(20_000_000)
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self.calls)


def time_ways(
    ways: Sequence[Way], device: str, *, rounds: int = 7, most_calls: int = 64, seconds: float = 2.0
) -> list[dict[str, Any]]:
    """Microseconds of each way that gives the right result, and why the others have none.

    Args:
        ways: of doing the same work; each is checked first.
        rounds: in each of which every way runs once.
        most_calls: in one graph.
        seconds: time after which no further round is begun.
    """
    found = []
    replays = []
    for way in ways:
        entry: dict[str, Any] = {"way": way.name, "kind": way.kind}
        found.append(entry)
        note = f"missing: {way.missing}" if way.missing else refused(way)
        if note:
            entry["note"] = note
            continue
        try:
            replay = Replay(way.calls[:most_calls], device)
            replay.seconds()
        except Exception as error:
            if way.kind == "ours":
                raise
            entry["note"] = f"missing: {describe(error)}"
            continue
        entry |= {"graph": replay.captured, "calls": len(replay.calls)}
        replays.append((entry, replay, []))
    begin = time.monotonic()
    for turn in range(rounds):
        for _, replay, times in replays:
            times.append(replay.seconds())
        if turn >= 2 and time.monotonic() - begin > seconds:
            break
    for entry, _, times in replays:
        entry["us"] = round(1e6 * statistics.median(times), 3)
        entry["us_range"] = [round(1e6 * t, 3) for t in (min(times), max(times))]
    return found


def our_us(ways: Sequence[dict[str, Any]]) -> float | None:
    return next((way.get("us") for way in ways if way["kind"] == "ours"), None)


def best_peer(ways: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    """The fastest of the peers: its name and microseconds."""
    peers = [(way["us"], way["way"]) for way in ways if way["kind"] == "peer" and way.get("us")]
    return min(peers)[::-1] if peers else None


def beside_peers(ways: Sequence[dict[str, Any]]) -> str:
    """Our time as a multiple of the best peer's, as text."""
    mine, peer = our_us(ways), best_peer(ways)
    if mine is None:
        return "ours gave no figure"
    return f"{mine:.1f} us" + (f", {mine / peer[1]:.2f}x of {peer[0]}" if peer else "")
