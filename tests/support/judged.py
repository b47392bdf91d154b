"""The cases of the ops' tests that backends run in `make test`; --full has the others.

The machine's own instruction set runs every case in every dtype. Each of the others runs every case
in one dtype, in turns, except AMX's tiles, which take bfloat16.

Of each case of CUDA's kernels, the judge of memory accesses runs one dtype, in turns, and the
emulator, with another schedule, the others.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quick import parameters

JUDGED, EMULATED = "cuda-judged", "cuda-emulated"


def without_repetitions(items: list[pytest.Item], own: str) -> list[pytest.Item]:
    """The tests, in their order, without dtypes that other cases or backends represent.

    Args:
        items: tests.
        own: the backend of the machine's own instruction set.
    """
    # For each function and case: the tests of all dtypes by backend.
    groups: dict[object, dict[str, dict[str, list[pytest.Item]]]] = {}
    for item in items:
        found = parameters(item)
        backend = getattr(found.get("ops"), "name", own)
        dtypes = {name for name, value in found.items() if isinstance(value, torch.dtype)}
        if backend != own and dtypes:
            case = str({n: str(v) for n, v in found.items() if n not in {*dtypes, "ops"}})
            cases = groups.setdefault(item.function, {}).setdefault(case, {})
            cases.setdefault(backend, []).append(item)
    left_out: set[pytest.Item] = set()
    for cases in groups.values():
        for number, backends in enumerate(cases.values()):
            for place, (backend, same) in enumerate(backends.items()):
                if backend in (JUDGED, EMULATED):
                    # A test without other cases runs all dtypes on both, and so does one that is
                    # not judged.
                    if len(cases) > 1 and JUDGED in backends:
                        others = set(same) - {same[number % len(same)]}
                        left_out |= others if backend == JUDGED else set(same) - others
                elif not backend.startswith("cuda"):
                    left_out |= _all_but_one(same, number + place, backend)
    return [item for item in items if item not in left_out]


def _all_but_one(same: list[pytest.Item], turn: int, backend: str) -> set[pytest.Item]:
    tiles = [item for item in same if "amx" in backend and torch.bfloat16 in _dtypes(item)]
    chosen = tiles or same
    return set(same) - {chosen[turn % len(chosen)]}


def _dtypes(item: pytest.Item) -> list[torch.dtype]:
    return [value for value in parameters(item).values() if isinstance(value, torch.dtype)]


def is_left_to_full(item: pytest.Item) -> bool:
    """Whether it is marked `full`, or `full(where=...)` with a condition on its parameters that
    holds."""
    return any(
        mark.kwargs["where"](parameters(item)) if mark.kwargs else True
        for mark in item.iter_markers("full")
    )


def judged(where: Callable[[object], bool]) -> Callable[[dict[str, object]], bool]:
    """For `full(where=...)`: cases under the judge whose `name` meets the condition."""
    return lambda case: case["ops"].name == "cuda-judged" and where(case["name"])


def on_emulated_tiles(where: Callable[[dict], bool]) -> Callable[[dict[str, object]], bool]:
    """For `full(where=...)`: cases on emulated tiles of AMX that meet the condition.

    The other cases run the same kernels on tiles, and a machine with AMX runs all of them.
    """
    return lambda case: case["ops"].name == "cpu-amx_bf16-emulated" and where(case)
