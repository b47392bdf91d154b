"""The CPU checks a step's rows once: two calls differ by contents and limits."""

import threading

import pytest
import torch

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import assert_same_bits, cpu_threads, int32


def batch(capacity=40, num_slots=4):
    """Arguments of ragged_attention for one decoded token of each of three rows."""
    generator = torch.Generator().manual_seed(capacity)
    key_cache, value_cache = torch.randn(2, num_slots, 2, capacity, 16, generator=generator)
    return {
        "query": torch.randn(3, 4, 16, generator=generator),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "cu_seqlens_q": int32([0, 1, 2, 3]),
        "slots": int32([0, 1, 3]),
        "starts": int32([0, 5, 2]),
        "lengths": int32([30, 20, 9]),
    }


def check(arguments):
    expected = reference.ragged_attention(**arguments)
    torch.testing.assert_close(baton_kernels.ragged_attention(**arguments), expected)


# Changes between two calls; each must be noticed after any other call.
CHANGES = {
    "other slots": lambda a: a["slots"].copy_(int32([3, 0, 2])),
    "other starts": lambda a: a["starts"].copy_(int32([10, 20, 31])),
    "other lengths": lambda a: a["lengths"].copy_(int32([1, 0, 38])),
    "two tokens of one row": lambda a: a["cu_seqlens_q"].copy_(int32([0, 2, 2, 3])),
    "fewer rows": lambda a: a.update(
        query=a["query"][:2], cu_seqlens_q=int32([0, 1, 2]),
        slots=a["slots"][:2], starts=a["starts"][:2], lengths=a["lengths"][:2],
    ),
    "other heads": lambda a: a.update(query=a["query"][:, :2]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_attention_of_changed_rows(change):
    arguments = batch()
    check(arguments)
    CHANGES[change](arguments)
    check(arguments)
    check(batch())


def test_rows_of_more_splits_than_before():
    """Partial results belong to the plan: long rows after short ones, and back."""
    short = batch()
    long = batch(capacity=3000) | {"lengths": int32([2900, 600, 9])}
    for arguments in (short, long, short, long):
        check(arguments)


FAULTS = {
    "slot": ("slots", lambda a: a["slots"].copy_(int32([0, 1, 4]))),
    "start": ("starts", lambda a: a["starts"].copy_(int32([11, 5, 2]))),
    "length": ("lengths", lambda a: a["lengths"].copy_(int32([30, 20, 41]))),
    "end": ("cu_seqlens_q", lambda a: a["cu_seqlens_q"].copy_(int32([0, 1, 2, 2]))),
    "bound": ("max_length", lambda a: a.update(max_length=29)),
    "capacity": ("starts|lengths", lambda a: a.update({k: a[k][:, :, :29] for k in CACHES})),
    "slots": ("slots", lambda a: a.update({k: a[k][:3] for k in CACHES})),
    "queries": ("cu_seqlens_q", lambda a: a.update(query=a["query"][:2])),
}
CACHES = ("key_cache", "value_cache")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_after_a_good_call_is_seen(fault):
    argument, change = FAULTS[fault]
    arguments = batch()
    check(arguments)
    change(arguments)
    # Rejected every time, and what was valid before is valid after.
    for _ in range(2):
        with pytest.raises(ValueError, match=f"ragged_attention: ({argument})"):
            baton_kernels.ragged_attention(**arguments)
    check(batch())


def test_threads_have_rows_of_their_own():
    results, arguments = {}, {0: batch(), 1: batch() | {"lengths": int32([7, 8, 9])}}
    expected = {i: baton_kernels.ragged_attention(**arguments[i]) for i in arguments}

    def run(i):
        torch.set_num_threads(1)
        results[i] = [baton_kernels.ragged_attention(**arguments[i]) for _ in range(50)]

    with cpu_threads(1):
        threads = [threading.Thread(target=run, args=(i,)) for i in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, got in results.items():
        for out in got:
            assert_same_bits(out, expected[i])


def rows_to_append(num_slots=4, capacity=8):
    key_cache, value_cache = torch.zeros(2, num_slots, 1, capacity, 16)
    key = torch.arange(3.0)[:, None, None].expand(3, 1, 16).contiguous() + 1
    return [key, -key, key_cache, value_cache, int32([0, 1, 1]), int32([2, 3, 7])]


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("slots", lambda a: a[4].copy_(int32([0, 4, 1]))),
        ("columns", lambda a: a[5].copy_(int32([2, 3, 8]))),
        ("slots and columns", lambda a: a[5].copy_(int32([2, 7, 7]))),
        ("columns", lambda a: a.__setitem__(slice(2, 4), [x[:, :, :7] for x in a[2:4]])),
        ("slots", lambda a: a.__setitem__(slice(2, 4), [x[:1] for x in a[2:4]])),
    ],
    ids=["slot", "column", "same place", "capacity", "num_slots"],
)
def test_appending_after_a_good_call(argument, change):
    arguments = rows_to_append()
    baton_kernels.append_kv(*arguments)
    change(arguments)
    before = arguments[2].clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"append_kv: {argument}"):
            baton_kernels.append_kv(*arguments)
    assert_same_bits(arguments[2], before)


def test_appending_to_other_columns():
    arguments = rows_to_append()
    baton_kernels.append_kv(*arguments)
    arguments[5].copy_(int32([4, 5, 6]))
    baton_kernels.append_kv(*arguments)
    assert arguments[2][:, 0, :, 0].tolist()[:2] == [
        [0, 0, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 2, 0, 2, 3, 3],
    ]


def test_many_rows_are_checked_without_being_kept():
    """More index values than are kept per thread."""
    count = 140_000
    cache = torch.zeros(2, 1, count, 16)
    key = torch.ones(count, 1, 16)
    columns = torch.arange(count, dtype=torch.int32)
    for _ in range(2):
        baton_kernels.append_kv(
            key, key, cache, cache.clone(), int32([1]).expand(count).contiguous(), columns
        )
    columns[5] = 6
    with pytest.raises(ValueError, match="slots and columns"):
        baton_kernels.append_kv(
            key, key, cache, cache.clone(), int32([1]).expand(count).contiguous(), columns
        )
