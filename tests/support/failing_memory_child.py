"""Run by tests/cpu/test_failing_memory.py with its library preloaded: every allocation fails once.

Prints a line of JSON: the number of allocations of each call, and what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile_calls import OPS, Described

import baton_kernels

CALLS_OF_AN_OP = 12
REPETITIONS = 30


def as_tuple(results: Any) -> tuple:
    return () if results is None else results if isinstance(results, tuple) else (results,)


def mapped() -> tuple[int, int]:
    """The addresses of the library."""
    name = str(Path(baton_kernels.__file__).with_name("libbaton_kernels.so"))
    spans = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(name)
    ]
    return min(int(a, 16) for a, _ in spans), max(int(b, 16) for _, b in spans)


def made(described: dict[str, Any]) -> dict[str, Any]:
    """Contiguous tensors with these descriptions, the same at each call."""
    generator = torch.Generator().manual_seed(0)

    def tensor(x: Any) -> Any:
        if not isinstance(x, Described):
            return x
        if x.values is not None:
            return torch.tensor(x.values, dtype=x.dtype).view(x.shape)
        return torch.randn(x.shape, generator=generator).to(x.dtype)

    return {name: tensor(x) for name, x in described.items()}


def in_a_new_thread(call: Any, until: threading.Event | None = None) -> None:
    """A new thread has none of the memory that threads keep. It lives on until the event, if
    any."""
    done = threading.Event()

    def run() -> None:
        try:
            call()
        finally:
            done.set()
        if until is not None:
            until.wait()

    threading.Thread(target=run).start()
    done.wait()


class Failing:
    """One call, whose allocations fail one after the other."""

    def __init__(self, memory: ctypes.CDLL, name: str, native: Any, described: dict[str, Any]):
        self.memory, self.name, self.native = memory, name, native
        self.described = described
        self.wrong: list[str] = []
        self.until: threading.Event | None = None  # when the threads that call may end
        self.may_do_without = False  # the call goes on with fewer threads

    def attempt(self, failing: int) -> int:
        """The number of allocations up to the one that fails."""
        arguments, before, counts = made(self.described), made(self.described), []

        def call() -> None:
            raised = None
            self.memory.failing_memory_arm(failing)
            try:
                self.native(**arguments)
            except ValueError:
                return  # a move into the source of another one
            except (MemoryError, RuntimeError) as error:
                raised = error
            finally:
                counts.append(self.memory.failing_memory_disarm())
            if failing < 0:
                return
            if raised is None and not self.may_do_without:
                self.wrong.append(f"{self.name}: allocation {failing} failed, and no error came")
            for name, x in before.items():
                if isinstance(x, torch.Tensor) and not torch.equal(arguments[name], x):
                    self.wrong.append(f"{self.name}: {name} changed, allocation {failing} failed")
            # The next call in this thread must find nothing half done.
            whole = made(self.described)
            same = as_tuple(self.native(**arguments)), as_tuple(self.native(**whole))
            pairs = [*zip(*same, strict=True), *((arguments[k], x) for k, x in whole.items())]
            for got, want in pairs:
                if isinstance(want, torch.Tensor) and not torch.equal(got, want):
                    self.wrong.append(f"{self.name}: other bits after allocation {failing} failed")

        in_a_new_thread(call, self.until)
        return counts[0] if counts else 0


def main() -> None:
    memory = ctypes.CDLL(sys.argv[1])
    memory.failing_memory_of.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    memory.failing_memory_arm.argtypes = [ctypes.c_int64]
    memory.failing_memory_held.restype = memory.failing_memory_disarm.restype = ctypes.c_int64
    memory.failing_memory_of(*mapped())
    allocations: dict[str, int] = {}
    wrong: list[str] = []
    allocations["threads"] = start_threads(memory, wrong)
    torch.set_num_threads(1)
    for op, draw in OPS.items():
        r = Random(f"memory:{op}")
        for _ in range(CALLS_OF_AN_OP):
            overload, described = draw(r)
            name = f"{op}.{overload}"
            native = getattr(getattr(torch.ops.baton_kernels, op), overload)
            call = Failing(memory, name, native, described)
            count = call.attempt(-1)
            for failing in range(count):
                call.attempt(failing)
            allocations[name] = allocations.get(name, 0) + count
            wrong += call.wrong
            if count and name not in leaks:
                leaks[name] = leaked(call)
    wrong += [f"{name}: {count} allocations leaked" for name, count in leaks.items() if count > 0]
    print(json.dumps({"allocations": allocations, "wrong": wrong}))


def start_threads(memory: ctypes.CDLL, wrong: list[str]) -> int:
    """Calling threads that all live at the same time: each starts separate helpers.

    Runs before everything else, because what is made for the first caller is kept.
    """
    torch.set_num_threads(3)
    shapes = {
        "x": Described([40, 256], torch.float32),
        "weight": Described([700, 256], torch.float32),
    }
    call = Failing(memory, "linear", torch.ops.baton_kernels.linear.default, shapes)
    call.until, call.may_do_without = threading.Event(), True
    made_by_all = [call.attempt(failing) for failing in (*range(8), -1)]
    call.until.set()
    wrong += call.wrong
    return sum(made_by_all)


leaks: dict[str, int] = {}


def leaked(call: Failing) -> int:
    """Bytes that the library holds after many failures, compared with one failure."""
    call.attempt(0)
    before = call.memory.failing_memory_held()
    for _ in range(REPETITIONS):
        call.attempt(0)
    return call.memory.failing_memory_held() - before


if __name__ == "__main__":
    main()
