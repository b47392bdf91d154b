"""The cost of keeping an aligned cache aligned: in place, and as `torch.cat` would do it."""

import pytest
import torch

from baton_engines.relay import Relay
from baton_engines.slots.concatenated_cache import ConcatenatedCache
from baton_engines.testing import FakeLlama
from baton_kernels import KVCache

# Two layers, keys and values of one head of 16 in float32.
BYTES_PER_TOKEN = 2 * 2 * 16 * 4


def make_cache(concatenate: bool) -> KVCache:
    cache = KVCache(2, 4, 1, 12, 16, aligned=True)
    return ConcatenatedCache(cache) if concatenate else cache


def write(cache: KVCache, slot: int) -> None:
    shape = cache.shape
    columns = slice(shape.start(slot), shape.end(slot))
    content = torch.arange(shape.length(slot)).float() + 100 * slot
    cache.keys[:, slot, 0, columns] = content[None, :, None]
    cache.values[:, slot, 0, columns] = -content[None, :, None]


def rows_of(cache: KVCache) -> dict[int, list[float]]:
    found = {}
    for slot in cache.shape.used:
        key, value = cache.extract(slot)
        assert torch.equal(key, -value)
        assert torch.equal(key, key[:1, :, :, :1].expand_as(key))
        found[slot] = key[0, :, 0, 0].tolist()
    return found


@pytest.mark.parametrize("concatenate", [False, True], ids=["in_place", "concatenate"])
def test_bytes_of_insertions_and_removals_worked_out_by_hand(concatenate):
    cache = make_cache(concatenate)

    def moved(tokens_in_place: int, tokens_concatenated: int) -> None:
        tokens = tokens_concatenated if concatenate else tokens_in_place
        assert cache.bytes_moved == tokens * BYTES_PER_TOKEN

    write(cache, cache.allocate(3))
    moved(0, 0)
    # A longer row: the first one moves right. Concatenated, it is rewritten with its padding.
    write(cache, cache.allocate(5))
    moved(3, 5)
    # A shorter row: nothing has to move, two rows of width five are rewritten.
    write(cache, cache.allocate(2))
    moved(3, 15)
    assert rows_of(cache) == {0: [0, 1, 2], 1: [100, 101, 102, 103, 104], 2: [200, 201]}
    if concatenate:
        # Padding of a row consists of zeros there, as padding operations produce them.
        assert not cache.keys[:, 0, :, :2].any() and not cache.values[:, 0, :, :2].any()
    # The longest row leaves: in place nothing is done until room is needed.
    cache.free(1)
    moved(3, 15 + 2 * 3)
    assert cache.shape.width == (3 if concatenate else 5)
    assert rows_of(cache) == {0: [0, 1, 2], 2: [200, 201]}
    cache.free(0)
    cache.free(2)
    moved(3, 21 + 2)
    cache.release()
    assert cache.bytes_committed == 0


def test_an_insertion_rewrites_the_cache_and_an_empty_row_does_not():
    cache = make_cache(True)
    write(cache, cache.allocate(3))
    key = torch.arange(100, 105).float()[None, :, None, None].expand(2, 5, 1, 16)
    assert cache.insert(key, -key, 2) == 2
    assert rows_of(cache) == {0: [0, 1, 2], 2: [100, 101, 102, 103, 104]}
    assert cache.bytes_moved == 5 * BYTES_PER_TOKEN
    cache.allocate(0, 1)
    cache.free(1)
    assert cache.bytes_moved == 5 * BYTES_PER_TOKEN


def test_a_rewritten_cache_commits_its_padding():
    cache = make_cache(True)
    cache.allocate(1)
    cache.allocate(12)
    # All of both rows, one page each per layer, for keys and for values.
    assert cache.bytes_committed == 2 * 2 * 2 * 4096


def test_shapings_give_the_same_answers_and_differ_in_what_they_copy():
    copied = {}
    for shaping in ("in_place", "concatenate"):
        model = FakeLlama()
        relay = Relay(model, 3, 48, aligned=True, shaping=shaping)
        queries = [relay.submit([i] * (1 + 5 * i % 23), max_new_tokens=2 + i) for i in range(12)]
        relay.preempt(queries[4])
        relay.step()
        relay.resume(queries[4])
        relay.run()
        for query in queries:
            assert query.tokens == model.decode_alone(query.prompt, query.max_new_tokens)
        assert relay.counters.shaping_bytes == relay.cache.bytes_moved
        copied[shaping] = relay.counters.shaping_bytes
    assert 0 < 5 * copied["in_place"] < copied["concatenate"]


def test_a_ragged_cache_copies_nothing():
    relay = Relay(FakeLlama(), 3, 48)
    for i in range(12):
        relay.submit([i] * (1 + 5 * i % 23), max_new_tokens=2 + i)
    relay.run()
    assert relay.counters.shaping_bytes == 0


def test_a_change_of_the_number_of_slots_is_counted():
    relay = Relay(FakeLlama(), 2, 48)
    relay.submit([1, 2, 3], max_new_tokens=9)
    relay.step()
    relay.step()
    relay.resize(4)
    assert relay.counters.resizes == 1
    # The prompt and the first of the two tokens.
    assert relay.counters.shaping_bytes == 4 * BYTES_PER_TOKEN
    relay.resize(4)
    assert relay.counters.resizes == 1
