"""Which tests the judge of memory accesses runs: all cases, but one 16-bit type of each.

float16 and bfloat16 are one kernel with another type of number: every access is at the same place.
So each case is judged under one of them, by turns; the emulator, which costs a fraction, runs both.
"""

from __future__ import annotations

import pytest
import torch
from quick import parameters

HALVES = (torch.float16, torch.bfloat16)


def without_the_other_half(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests, in their order."""
    groups: dict[object, dict[str, list[pytest.Item]]] = {}
    for item in items:
        found = parameters(item)
        dtypes = [name for name, value in found.items() if value in HALVES]
        if getattr(found.get("ops"), "name", None) == "cuda-judged" and len(dtypes) == 1:
            others = str({name: str(value) for name, value in found.items() if name != dtypes[0]})
            groups.setdefault(item.function, {}).setdefault(others, []).append(item)
    left_out = set()
    for cases in groups.values():
        for number, pair in enumerate(cases.values()):
            # A test that has no other cases is judged under both.
            if len(cases) > 1 and len(pair) == 2:
                left_out.add(pair[number % 2])
    return [item for item in items if item not in left_out]
