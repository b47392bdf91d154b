"""Measures a cell: first the gate, then every system in turns, repeat by repeat.

The order of the systems changes from repeat to repeat, so that a machine that becomes slower or
faster favors none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from baton_engines.llama import patch_llama

from .. import workloads
from ..workloads import Request
from .cells import Cell
from .engines import ENGINES, EngineProcess
from .limit import Ceiling, Sizes, limit_seconds, work_seconds
from .peers import PEERS
from .run import Job, Run, make_jobs, run_relay
from .systems import REFERENCE, SYSTEMS

Report = Callable[[str], object]


class GateError(RuntimeError):
    """Systems that must give the same tokens do not, so none of their figures counts."""


def agreement(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The number of equal answers, and the share of tokens before the first difference."""
    same = before = 0
    for a, b in zip(expected, got, strict=True):
        same += list(a) == list(b)
        before += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    return {
        "equal_queries": same,
        "queries": len(expected),
        "equal_tokens": before / sum(map(len, expected)),
    }


def check_lengths(name: str, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> None:
    """Checks that every answer of every system has the requested number of tokens.

    Raises:
        GateError: an answer has a different number.
    """
    for index, (request, answer) in enumerate(zip(requests, tokens, strict=True)):
        if len(answer) != request.output_tokens:
            raise GateError(
                f"bench: answer {index} of {name} must have {request.output_tokens} tokens, "
                f"got {len(answer)}"
            )


class Session:
    """A model and what its cells share.

    Args:
        model: LlamaForCausalLM; patched while a relay runs.
        stream: tokens that prompts are taken from.
        sizes: of the model.
        report: called with a line of progress.
    """

    def __init__(self, model: Any, stream: Sequence[int], sizes: Sizes, report: Report = print):
        self.model = model
        self.stream = stream
        self.sizes = sizes
        self.report = report
        self._saturated: dict[Cell, float] = {}
        self._handle: Any = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._patch(False)

    def requests(self, cell: Cell) -> tuple[list[Request], float | None]:
        """The cell's requests, and the queries/s that its load is a share of."""
        saturated = None
        if cell.arrivals != "at once" and cell.rate is None:
            key = cell.calibration()
            if key not in self._saturated:
                self.report("  calibration: the reference system, all queries at once")
                run = self._run_relay(REFERENCE, key, make_jobs(key.at_once(), self.stream))
                self._saturated[key] = run.figures["queries_per_second"]
            saturated = self._saturated[key]
        return cell.requests(saturated), saturated

    def measure(self, cell: Cell, ceiling: Ceiling, engines: Sequence[str] = ()) -> dict[str, Any]:
        """Everything about a cell, ready for JSON.

        Raises:
            GateError: answers of relays differ in float32, or have a wrong length in any dtype.
        """
        requests, saturated = self.requests(cell)
        jobs = make_jobs(requests, self.stream)
        relays = list(cell.systems or SYSTEMS)
        peers = list(PEERS) if cell.peers else []
        runs: dict[str, list[Run]] = {name: [] for name in (*relays, *peers, *engines)}
        failed: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            self._warm_up(peers, cell, jobs, failed)
            running = self._start(engines, cell, jobs, failed, stack)
            turns = [*relays, *peers, *running]
            for repeat in range(cell.repeats):
                turn = repeat % len(turns)
                for name in turns[turn:] + turns[:turn]:
                    if name in failed or (name in peers and repeat):
                        continue
                    self.report(f"  repeat {repeat + 1} of {cell.repeats}: {name}")
                    if name in relays:
                        runs[name].append(self._run_relay(name, cell, jobs))
                        continue
                    try:
                        runs[name].append(
                            running[name].run()
                            if name in running
                            else self._run_peer(name, cell, jobs)
                        )
                    except Exception as error:
                        # Other people's code may fail; our figures must not be lost with it.
                        failed[name] = str(error) or type(error).__name__
        expected = runs[REFERENCE if REFERENCE in relays else relays[0]][0].tokens
        agreed = {
            name: self._gate(name, cell, requests, expected, its, strict=name in relays)
            for name, its in runs.items()
            if its
        }
        limit = limit_seconds(requests, self.sizes, ceiling, cell.slots)
        return {
            **asdict(cell),
            "title": cell.title,
            "saturated_queries_per_second": saturated,
            "offered_queries_per_second": workloads.offered_rate(requests),
            "prompt_tokens": sum(request.prompt_tokens for request in requests),
            "output_tokens": sum(request.output_tokens for request in requests),
            "limit_seconds": limit,
            "limit_queries_per_second": len(requests)
            / work_seconds(requests, self.sizes, ceiling, cell.slots),
            "failed": failed,
            "engines": {name: process.about for name, process in running.items()},
            "systems": {
                name: {
                    "says": _says(name),
                    "kind": "relay" if name in relays else "peer",
                    "agreement": agreed[name],
                    "runs": [
                        {
                            **run.figures,
                            "limit_share": limit / run.figures["seconds"],
                            **self._steps_share(cell, requests, ceiling, run.figures),
                        }
                        for run in its
                    ],
                    "spans": its[0].spans if cell.timeline else [],
                }
                for name, its in runs.items()
                if its and name not in failed
            },
        }

    def _run_relay(self, name: str, cell: Cell, jobs: Sequence[Job]) -> Run:
        capacity = workloads.longest(job.request for job in jobs)
        self._patch(True)
        return run_relay(lambda: SYSTEMS[name].relay(self._handle, cell.slots, capacity), jobs)

    def _run_peer(self, name: str, cell: Cell, jobs: Sequence[Job]) -> Run:
        self._patch(False)
        return PEERS[name].run(self.model, jobs, cell.slots)

    def _patch(self, on: bool) -> None:
        """Runs outside of all timings, because the patch merges weights, which takes a while."""
        if on and self._handle is None:
            self._handle = patch_llama(self.model)
        elif not on and self._handle is not None:
            self._handle.undo()
            self._handle = None

    def _warm_up(
        self, peers: Sequence[str], cell: Cell, jobs: Sequence[Job], failed: dict[str, str]
    ) -> None:
        """Keeps every row busy for a few tokens; a peer that cannot do that has failed."""
        few = [
            Job(replace(job.request, arrival_seconds=0.0, output_tokens=3), job.token_ids)
            for job in jobs[: cell.slots]
        ]
        self._run_relay(REFERENCE, cell, few)
        for name in peers:
            try:
                self._run_peer(name, cell, few)
            except Exception as error:
                failed[name] = str(error) or type(error).__name__

    def _start(
        self,
        engines: Sequence[str],
        cell: Cell,
        jobs: Sequence[Job],
        failed: dict[str, str],
        stack: contextlib.ExitStack,
    ) -> dict[str, EngineProcess]:
        """The engines that started, which the stack closes; and why the others did not."""
        running = {}
        for name in engines:
            self.report(f"  starting {name}")
            try:
                running[name] = EngineProcess(ENGINES[name], jobs, cell.dtype, cell.slots)
            except Exception as error:
                failed[name] = str(error) or type(error).__name__
            else:
                stack.callback(running[name].close)
        return running

    @staticmethod
    def _gate(
        name: str,
        cell: Cell,
        requests: Sequence[Request],
        expected: Sequence[Sequence[int]],
        runs: Sequence[Run],
        *,
        strict: bool,
    ) -> dict[str, Any]:
        for run in runs:
            check_lengths(name, requests, run.tokens)
        agreed = min(
            (agreement(expected, run.tokens) for run in runs),
            key=lambda counts: counts["equal_queries"],
        )
        if strict and cell.dtype == "float32" and agreed["equal_queries"] < agreed["queries"]:
            raise GateError(
                f"bench: float32 answers of {name} must be those of {REFERENCE}, got "
                f"{agreed['equal_queries']} of {agreed['queries']} equal in: {cell.title}"
            )
        return agreed

    def _steps_share(
        self,
        cell: Cell,
        requests: Sequence[Request],
        ceiling: Ceiling,
        figures: Mapping[str, float | None],
    ) -> dict[str, float]:
        """The limit for the steps that were actually taken, as a share of the time."""
        if cell.arrivals != "at once" or not figures.get("steps"):
            return {}
        steps = int(figures["steps"])
        seconds = work_seconds(requests, self.sizes, ceiling, cell.slots, steps=steps)
        return {"steps_limit_share": seconds / figures["seconds"]}


def _says(name: str) -> str:
    for table in (SYSTEMS, PEERS, ENGINES):
        if name in table:
            return table[name].says
    raise KeyError(name)
