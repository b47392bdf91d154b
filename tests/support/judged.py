"""Which cases the emulated CUDA backends run, and what the marker `full` leaves to --full.

float16 and bfloat16 are one kernel with another type of number: every access is at the same place,
and every sum in the same order. So of each case the judge of memory accesses runs one of them, by
turns, and the emulator, under another schedule, the other one; float32 runs on both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quick import parameters

HALVES = (torch.float16, torch.bfloat16)
# One whose name is not here runs both types.
TAKES = {"cuda-judged": 1, "cuda-emulated": 0}


def without_the_other_half(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests, in their order."""
    groups: dict[object, dict[str, dict[str, list[pytest.Item]]]] = {}
    for item in items:
        found = parameters(item)
        backend = getattr(found.get("ops"), "name", None)
        dtypes = [name for name, value in found.items() if value in HALVES]
        if backend in TAKES and len(dtypes) == 1:
            others = str({
                name: str(value) for name, value in found.items() if name not in (dtypes[0], "ops")
            })  # fmt: skip
            cases = groups.setdefault(item.function, {}).setdefault(others, {})
            cases.setdefault(backend, []).append(item)
    left_out = set()
    for cases in groups.values():
        for number, backends in enumerate(cases.values()):
            for backend, pair in backends.items():
                # A test that has no other cases runs both, and so does one that nobody judges.
                if len(cases) > 1 and len(pair) == 2 and "cuda-judged" in backends:
                    left_out.add(pair[(number + 1 - TAKES[backend]) % 2])
    return [item for item in items if item not in left_out]


def is_left_to_full(item: pytest.Item) -> bool:
    """Whether it is marked `full`, or `full(where=...)` with a condition on its parameters that
    holds."""
    return any(
        mark.kwargs["where"](parameters(item)) if mark.kwargs else True
        for mark in item.iter_markers("full")
    )


def judged(where: Callable[[object], bool]) -> Callable[[dict[str, object]], bool]:
    """For `full(where=...)`: under the judge, the cases with such a `name`."""
    return lambda case: case["ops"].name == "cuda-judged" and where(case["name"])
