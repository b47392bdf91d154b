"""The ops' own tests on one backend, in processes that are replaced when one dies."""

from __future__ import annotations

import collections
import importlib.util
import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

import baton_kernels

from .device import Stage, run

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 8
TEST_SECONDS = 40


def test_files(ops: Iterable[str]) -> list[str]:
    """The test file of every given op, in any folder of the tests."""
    names = {f"test_{op}.py" for op in ops}
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if path.name in names)


def backend_of(stage: Stage, name: str) -> tuple[str, list[str]]:
    """A backend's name in the tests, and which tests to choose."""
    isas = baton_kernels.build_info()["cpu"]
    if name == "amx":
        if "amx_bf16" not in isas["isa_found"] or "amx_bf16" not in isas["isa_compiled"]:
            stage.skip("the host has no AMX")
        return "cpu-amx_bf16", ["-k", "bfloat16 or dtype2" if not stage.small else "by_hand"]
    if stage.small:
        return f"cpu-{isas['isa_used']}", ["-k", "by_hand or no_rows"]
    return {"cuda": "cuda", "triton": "triton-cuda"}[name], []


class Collector:
    """Collects every test's outcome, and saves it to disk at most a second later."""

    def __init__(self, stage: Stage):
        self.record = stage.record
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
        self.saved = 0.0
        self.crashes = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes one phase of one test; xdist passes on those of its workers."""
        if report.when != "call" and report.outcome == "passed":
            return
        before = self.outcomes.get(report.nodeid)
        if before == "failed":
            return
        self.outcomes[report.nodeid] = report.outcome
        if report.outcome == "failed":
            text = str(report.longrepr)
            self.crashes += "crashed while running" in text
            self.failures[op_of(report.nodeid)].append(
                {"test": report.nodeid.rpartition("/")[2], "text": text[-1500:]}
            )
        if time.monotonic() - self.saved > 1.0:
            self.save()

    def pytest_sessionfinish(self) -> None:
        self.save()

    def save(self) -> None:
        """Rows by op, and a headline."""
        counts = collections.Counter(self.outcomes.values())
        by_op = collections.defaultdict(collections.Counter)
        for test, outcome in self.outcomes.items():
            by_op[op_of(test)][outcome] += 1
        self.record.rows = [
            {"case": op, **found, "failures": self.failures.get(op, [])[:40]}
            for op, found in sorted(by_op.items())
        ]
        self.record.headline = (
            f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
            f"{f', {self.crashes} processes died' if self.crashes else ''}"
        )
        self.record.lines = [
            f"{op}: {failed[0]['test'].partition('::')[2]} and {len(failed) - 1} others failed"
            for op, failed in sorted(self.failures.items())
        ]
        self.record.save()
        self.saved = time.monotonic()


def op_of(test: str) -> str:
    return test.partition("::")[0].rpartition("test_")[2].removesuffix(".py")


def op_tests(stage: Stage, name: str) -> None:
    """The stage."""
    backend, selection = backend_of(stage, name)
    arguments = [
        "--backend", backend, *selection, "-p", "no:cacheprovider", "-p", "bench.gpu_day.poison",
        "--tb=short", "-q", f"--rootdir={ROOT}",
    ]  # fmt: skip
    processes = stage.pick(min(PROCESSES, os.cpu_count() or 1), 1)
    # Collecting the tests of all ops takes seconds per process; two ops are enough to try the
    # stage.
    ops = stage.pick(baton_kernels.ops.__all__, ("merge_attention", "rms_norm"))
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(processes), "--dist=worksteal", "--max-worker-restart=64"]
    if importlib.util.find_spec("pytest_timeout"):
        # A thread does this, because a process that waits for its GPU receives no signal.
        arguments += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    collector = Collector(stage)
    code = pytest.main([*arguments, *test_files(ops)], plugins=[collector])
    collector.save()
    if not collector.outcomes:
        raise SystemExit(f"no test ran: pytest ended with {code}")
    raise SystemExit(int(any(o == "failed" for o in collector.outcomes.values())))


if __name__ == "__main__":
    run(op_tests, "backend")
