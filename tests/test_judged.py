"""The dtypes of an op's cases that `make test` leaves to --full.

| test | what it holds |
| --- | --- |
| own | the machine's own instruction set runs every case in every dtype |
| turns | every other one runs every case, in one dtype, and every dtype in some case |
| tiles | AMX runs every case in bfloat16 |
| shares | the judge runs one dtype of each case, the emulator the others |
"""

from types import SimpleNamespace

import judged
import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = ("decode", "prefill", "mixture", "windows")
OWN = "cpu-avx512_bf16"
BACKENDS = (
    OWN,
    "cpu-avx2",
    "cpu-baseline",
    "cpu-amx_bf16-emulated",
    "cuda-judged",
    "cuda-emulated",
)


class Item:
    """The part of pytest's items that is used."""

    function = "test"

    def __init__(self, params: dict[str, object]):
        self.callspec = SimpleNamespace(params=params)


@pytest.fixture
def kept() -> dict[tuple[str, str], set[torch.dtype]]:
    """The dtypes that are run, by backend and case."""

    items = [
        Item({"ops": SimpleNamespace(name=backend), "name": case, "dtype": dtype})
        for backend in BACKENDS for case in CASES for dtype in DTYPES
    ]  # fmt: skip
    found: dict[tuple[str, str], set[torch.dtype]] = {}
    for each in judged.without_repetitions(items, OWN):
        params = each.callspec.params
        found.setdefault((params["ops"].name, params["name"]), set()).add(params["dtype"])
    return found


def test_own(kept):
    assert all(kept[OWN, case] == set(DTYPES) for case in CASES)


@pytest.mark.parametrize("backend", ["cpu-avx2", "cpu-baseline"])
def test_turns(kept, backend):
    assert [len(kept[backend, case]) for case in CASES] == [1] * len(CASES)
    assert set.union(*(kept[backend, case] for case in CASES)) == set(DTYPES)


def test_tiles(kept):
    assert all(kept["cpu-amx_bf16-emulated", case] == {torch.bfloat16} for case in CASES)


def test_shares(kept):
    by_judge = [kept["cuda-judged", case] for case in CASES]
    assert [len(dtypes) for dtypes in by_judge] == [1] * len(CASES)
    assert set.union(*by_judge) == set(DTYPES)
    for case, dtypes in zip(CASES, by_judge, strict=True):
        assert kept["cuda-emulated", case] == set(DTYPES) - dtypes
