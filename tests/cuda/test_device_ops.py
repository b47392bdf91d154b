"""The backend for tests on a GPU, run on the CPU in place of a GPU."""

import pytest
import torch
from device_ops import DeviceOps

import baton_kernels
from baton_kernels.testing import assert_same_bits, embed, int32, poison_, storage, twin

OPS = DeviceOps("cpu")


def problem():
    key, value = embed(torch.randn(3, 2, 16)), embed(torch.randn(3, 2, 16))
    caches = [embed(poison_(torch.empty(4, 2, 6, 16))) for _ in range(2)]
    return [key, value, *caches, int32([0, 1, 3]), int32([2, 0]), int32([4, 1])]


def test_writes_come_back_and_nothing_else_changes():
    arguments = problem()
    expected = [twin(x) for x in arguments]
    baton_kernels.insert_kv(*expected)
    assert OPS.insert_kv(*arguments) is None
    for got, want in zip(arguments, expected, strict=True):
        assert_same_bits(storage(got), storage(want))


def test_results_come_back():
    arguments = problem()
    places = int32([0, 2]), int32([1]), int32([2])
    for got, want in zip(
        OPS.extract_kv(*arguments[2:4], *places, total_tokens=2),
        baton_kernels.extract_kv(*arguments[2:4], *places, total_tokens=2),
        strict=True,
    ):
        assert_same_bits(got, want)


def test_shared_memory_stays_shared():
    """One memory holds both caches, as in engines that keep keys and values together."""
    key, value, *_, cu_seqlens, slots, starts = problem()
    both = torch.zeros(2, 4, 2, 6, 16)
    OPS.insert_kv(key, value, both[0], both[1], cu_seqlens, slots, starts)
    assert_same_bits(both[0, 2, :, 4], key[0])
    assert_same_bits(both[1, 0, :, 1:3].transpose(0, 1), value[1:])


def test_errors_pass_through():
    with pytest.raises(ValueError, match="insert_kv: slots"):
        OPS.insert_kv(*problem()[:5], int32([9, 0]), int32([0, 0]))
