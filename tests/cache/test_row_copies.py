"""Copies of rows and caches: copy_row, deepcopy, pickle; and caches larger than memory."""

import copy
import pickle

import psutil
import pytest
import torch
from torch import nn

from baton_engines import patch_llama
from baton_engines.llama import PackedBatch
from baton_engines.slots.concatenated_cache import ConcatenatedCache
from baton_engines.testing.small_llama import small_llama
from baton_kernels import KVCache

SIZES = (2, 4, 3, 8, 16)
BOTH = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])


def filled(aligned: bool, dtype=torch.float32, sizes=SIZES) -> KVCache:
    """Three rows of 3, 5 and 2 tokens, all padding NaN; slot 1 is free."""
    cache = KVCache(*sizes, dtype=dtype, aligned=aligned)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    generator = torch.Generator().manual_seed(0)
    for slot, tokens in ((0, 3), (1, 1), (2, 5), (3, 2)):
        key, value = torch.randn(2, sizes[0], tokens, sizes[2], sizes[4], generator=generator)
        cache.insert(key.to(dtype), value.to(dtype), slot)
    cache.free(1)
    return cache


def rows_of(cache: KVCache) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {slot: cache.extract(slot) for slot in cache.shape.used}


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for slot, pair in expected.items():
        for tensor, other in zip(actual[slot], pair, strict=True):
            assert torch.equal(tensor, other)


@BOTH
@pytest.mark.parametrize("source", [0, 2, 3])
@pytest.mark.parametrize("length", [None, 0, 1, 2])
@pytest.mark.parametrize("target", [None, 1])
def test_a_copied_row(aligned, source, length, target):
    cache = filled(aligned)
    before = rows_of(cache)
    assert cache.copy_row(source, target, length=length) == 1
    expected = tuple(tensor[:, :length] for tensor in before[source])
    assert_same(rows_of(cache), {**before, 1: expected})
    assert cache.bytes_committed > 0
    # The copy is an independent row.
    if length != 0:
        cache.keys[:, 1, :, cache.shape.start(1)] = 7.0
        assert_same({source: cache.extract(source)}, {source: before[source]})


def test_a_copied_row_worked_out_by_hand():
    cache = KVCache(1, 2, 1, 4, 16)
    key = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 1, 16).contiguous()
    cache.insert(key, -key, 0)
    assert cache.copy_row(0, length=2) == 1
    assert cache.keys[0, 1, 0, :2, 0].tolist() == [0.0, 1.0]
    assert cache.values[0, 1, 0, :2, 0].tolist() == [0.0, -1.0]
    assert cache.shape.length(1) == 2


@BOTH
def test_bad_copies_change_nothing(aligned):
    cache = filled(aligned)
    before = rows_of(cache)
    for arguments, options, message in (
        ((1,), {}, "slot must be in use, got 1|slot"),
        ((0, 2), {}, "slot"),
        ((0, 9), {}, "slot"),
        ((0,), {"length": 4}, "KVCache.copy_row: length must be from 0 to 3, got 4"),
        ((0,), {"length": -1}, "KVCache.copy_row: length must be from 0 to 3, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.copy_row(*arguments, **options)
        assert_same(rows_of(cache), before)
    cache.copy_row(0)
    with pytest.raises(ValueError, match="more than the rows in use"):
        cache.copy_row(0)


def copies(cache: KVCache) -> dict[str, KVCache]:
    return {
        "deepcopy": copy.deepcopy(cache),
        "copy": copy.copy(cache),
        "pickle": pickle.loads(pickle.dumps(cache)),
    }


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_copies_have_the_same_rows_in_memory_of_their_own(aligned, dtype, huge_pages):
    cache = filled(aligned, dtype)
    if huge_pages:
        cache = KVCache(*SIZES, dtype=dtype, aligned=aligned, huge_pages=True)
        cache.insert(*(tensor.to(dtype) for tensor in torch.randn(2, 2, 4, 3, 16)), 2)
    before = rows_of(cache)
    for name, copied in copies(cache).items():
        assert (repr(copied), type(copied)) == (repr(cache), type(cache)), name
        assert_same(rows_of(copied), before)
        assert copied.bytes_reserved == cache.bytes_reserved
        assert copied.shape is not cache.shape and copied.shape == cache.shape
        copied.keys.zero_()
        copied.free(2)
        copied.resize(5)
        assert_same(rows_of(cache), before)


def test_a_copy_commits_only_what_it_holds():
    cache = KVCache(1, 64, 8, 2048, 64)
    cache.insert(torch.ones(1, 16, 8, 64), torch.ones(1, 16, 8, 64), 63)
    for name, copied in copies(cache).items():
        assert copied.bytes_committed == cache.bytes_committed, name
    assert len(pickle.dumps(cache)) < 4 * cache.bytes_in_use


def test_copies_of_an_empty_cache_and_of_containers():
    cache = KVCache(*SIZES)
    shared = copy.deepcopy({"a": cache, "b": cache})
    assert shared["a"] is shared["b"] is not cache
    assert shared["a"].insert(torch.ones(2, 1, 3, 16), torch.ones(2, 1, 3, 16)) == 0
    assert cache.shape.used == ()


def test_copies_of_a_cache_that_concatenates():
    cache = ConcatenatedCache(filled(True))
    cache.insert(torch.ones(2, 3, 3, 16), torch.ones(2, 3, 3, 16))
    before = rows_of(cache)
    for copied in copies(cache).values():
        assert type(copied) is ConcatenatedCache
        assert_same(rows_of(copied), before)
    cache.copy_row(0)
    assert_same(rows_of(cache), {0: before[0], 1: before[0]})


def test_a_prompt_in_a_copied_cache_goes_on_as_in_the_first():
    """How users reuse the cache of a long prompt."""
    with patch_llama(small_llama()) as llama, torch.inference_mode():
        cache = llama.new_cache(2, 16)
        cache.allocate(5)
        batch = PackedBatch.from_shape(cache.shape, [0], [5])
        llama.forward(torch.arange(5), batch, cache)
        logits = []
        for one in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            one.extend([0])
            batch = PackedBatch.from_shape(one.shape, [0])
            logits.append(llama.forward(torch.tensor([9]), batch, one))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_cache_larger_than_memory():
    """Address space is not memory: pages that are never written are never needed."""
    columns = int(1.5 * psutil.virtual_memory().total) // 2048
    cache = KVCache(1, 1, 8, columns, 128, dtype=torch.bfloat16)
    assert cache.bytes_reserved > 2 * psutil.virtual_memory().total
    cache.insert(*torch.ones(2, 1, 4, 8, 128, dtype=torch.bfloat16))
    assert cache.extract(0)[0].sum().item() == 4 * 8 * 128
    assert 0 < cache.bytes_committed < 2**20
    cache.free(0)
    cache.release()
    assert cache.bytes_committed == 0


def test_a_module_may_hold_a_cache():
    module = nn.Module()
    module.cache = filled(False)
    assert_same(rows_of(copy.deepcopy(module).cache), rows_of(module.cache))
