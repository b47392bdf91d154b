"""A KVCache of an eight-bit type: scales always move with their elements."""

import copy
import pickle

import pytest
import torch
from eight_bit import EIGHT_BITS

from baton_kernels import KVCache
from baton_kernels.reference._eight_bit import as_they_are, dequantize, quantize
from baton_kernels.testing import assert_same_bits

BOTH = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
STORED = pytest.mark.parametrize("stored", EIGHT_BITS, ids=str)


def query(tokens, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    return tuple(torch.randn(2, tokens, 3, 16, generator=generator).to(dtype) for _ in range(2))


def small(stored, aligned=False, **options):
    """Two layers, four slots, eight columns; poison everywhere."""
    cache = KVCache(2, 4, 3, 8, 16, dtype=stored, aligned=aligned, **options)
    for elements, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        elements.view(torch.int8).fill_(0x7F)
        scales.fill_(float("nan"))
    return cache


def assert_rows(cache, queries):
    """Every row is its query quantized, both as stored and as floats."""
    assert cache.shape.used == tuple(sorted(queries))
    for slot, given in queries.items():
        raw, floats = cache.extract(slot), cache.extract(slot, dtype=torch.float32)
        for x, taken, numbers in zip(given, raw, floats, strict=True):
            expected = quantize(x, cache.keys.dtype)
            assert_same_bits(taken.view(torch.int8), as_they_are(*expected).view(torch.int8))
            assert_same_bits(numbers, dequantize(*expected, torch.float32))


def filled(stored, aligned):
    cache = small(stored, aligned)
    queries = {slot: query(n, slot) for slot, n in ((0, 5), (1, 1), (2, 3))}
    for slot, (key, value) in queries.items():
        assert cache.insert(key, value) == slot
    cache.free(1)
    del queries[1]
    return cache, queries


@BOTH
@STORED
def test_rows_go_in_move_and_come_out(stored, aligned):
    cache, queries = filled(stored, aligned)
    assert_rows(cache, queries)
    # A longer row moves the others of an aligned cache; trim moves them back.
    queries[1] = query(7, 9)
    assert cache.insert(*queries[1]) == 1
    assert_rows(cache, queries)
    cache.free(1)
    del queries[1]
    cache.trim()
    assert_rows(cache, queries)
    queries[cache.copy_row(2)] = queries[2]
    assert_rows(cache, queries)
    queries[3] = tuple(x[:, :2] for x in queries[0])
    assert cache.copy_row(0, 3, length=2) == 3
    assert_rows(cache, queries)


@BOTH
@STORED
def test_growth_copies_and_pickles(stored, aligned):
    cache, queries = filled(stored, aligned)
    before = cache.bytes_in_use
    cache.resize(7)
    assert cache.key_scales.shape == cache.keys.shape[:-1] == (2, 7, 3, 8)
    assert_rows(cache, queries)
    assert cache.bytes_in_use == before
    twins = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    cache.key_scales.fill_(7.0)
    cache.keys.view(torch.int8).fill_(1)
    for twin in twins:
        assert_rows(twin, queries)
    twins[0].resize(3)
    assert_rows(twins[0], queries)


@STORED
def test_a_row_that_was_taken_out_comes_back_bit_by_bit(stored):
    cache, queries = filled(stored, False)
    taken = cache.extract(0)
    cache.free(0)
    other = small(stored)
    for target in (cache, other):
        slot = target.insert(*taken, 3)
        for got, want in zip(target.extract(slot), taken, strict=True):
            assert_same_bits(got.view(torch.int8), want.view(torch.int8))


@STORED
def test_bytes(stored):
    cache = small(stored)
    assert cache.bytes_per_token == 2 * 2 * 3 * (16 + 4)
    cache.insert(*query(5))
    assert cache.bytes_in_use == 5 * cache.bytes_per_token
    assert cache.bytes_committed > 0
    cache.free(0)
    cache.release()
    assert cache.bytes_committed == 0
    floats = KVCache(2, 4, 3, 8, 16)
    assert floats.key_scales is None and floats.value_scales is None and floats.scales() == {}
    assert floats.bytes_per_token == 2 * 2 * 3 * 16 * 4


@STORED
def test_huge_pages_are_the_elements_only(stored):
    cache, small_pages = (
        KVCache(1, 2, 3, 64, 16, dtype=stored, huge_pages=huge) for huge in (True, False)
    )
    cache.insert(*(x[:1, :, :, :] for x in query(5)))
    assert cache.bytes_reserved >= small_pages.bytes_reserved


def test_scales_by_layer():
    cache = small(torch.int8)
    whole, one = cache.scales(), cache.scales(1)
    assert whole["key_scale"].data_ptr() == cache.key_scales.data_ptr()
    assert one["value_scale"].data_ptr() == cache.value_scales[1].data_ptr()
    for index in (-1, 2):
        with pytest.raises(ValueError, match="KVCache.scales: index"):
            cache.scales(index)


def test_refusals():
    cache = small(torch.int8)
    key, value = query(2)
    for bad, error, text in (
        ((key, value.half()), TypeError, "value must be float32 as key, got float16"),
        ((key.double(), value.double()), TypeError, "key must be float32, float16 or bfloat16"),
        ((key.to(torch.int8), value.to(torch.int8)), ValueError, r"key must be of shape"),
        ((key[..., :8], value[..., :8]), ValueError, "key must be of shape"),
    ):
        with pytest.raises(error, match=f"KVCache.insert: {text}"):
            cache.insert(*bad)
        assert cache.shape.used == ()
    with pytest.raises(
        NotImplementedError, match="KVCache: device must be cpu with int8, got meta"
    ):
        KVCache(1, 1, 1, 1, 16, dtype=torch.int8, device="meta")
