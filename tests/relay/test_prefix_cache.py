"""Beginnings that are kept and reused: answers do not change, and memory stays bounded."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_settings import watch_budget
from relay_checks import assert_empty
from relay_workload import make_model

from baton_engines import Relay
from baton_engines.policies import NAMES
from baton_engines.slots.prefix_cache import BLOCK_TOKENS, KeysValues, PrefixCache
from baton_engines.testing import FakeLlama
from baton_kernels.testing import available_cpu_isas, cpu_isa

BLOCK_BYTES = 2 * BLOCK_TOKENS * 4
SYSTEM = [(7 * i + i // 5) % 47 for i in range(3 * BLOCK_TOKENS)]


def block(begin: int) -> KeysValues:
    """A block with one layer, head and dimension, whose numbers say where it begins."""
    content = torch.full((1, BLOCK_TOKENS, 1, 1), float(begin))
    return KeysValues(content, -content)


def keep(cache: PrefixCache, tokens, calls=None) -> None:
    def read(begin, end):
        assert end - begin == BLOCK_TOKENS
        if calls is not None:
            calls.append(begin)
        return block(begin)

    cache.keep(tokens, read)


# The tree.


def test_what_is_kept_is_found_in_whole_blocks():
    cache = PrefixCache(100 * BLOCK_BYTES)
    calls = []
    keep(cache, SYSTEM + [1, 2, 3], calls)
    assert calls == [0, BLOCK_TOKENS, 2 * BLOCK_TOKENS]
    assert (len(cache), cache.bytes_in_use) == (3, 3 * BLOCK_BYTES)
    assert cache.find(SYSTEM, len(SYSTEM)) == len(SYSTEM)
    assert cache.find(SYSTEM + [9], len(SYSTEM) + 1) == len(SYSTEM)
    assert cache.find(SYSTEM, len(SYSTEM) - 1) == 2 * BLOCK_TOKENS
    assert cache.find(SYSTEM[1:], 1000) == 0
    assert cache.find([], 0) == 0
    assert [b.key[0, 0, 0, 0].item() for b in cache.take(SYSTEM, 70)] == [0.0, BLOCK_TOKENS]


def test_a_shared_beginning_is_held_once():
    cache = PrefixCache(100 * BLOCK_BYTES)
    keep(cache, SYSTEM)
    calls = []
    other = SYSTEM[: 2 * BLOCK_TOKENS] + [46 - token for token in SYSTEM[:BLOCK_TOKENS]]
    keep(cache, other, calls)
    assert calls == [2 * BLOCK_TOKENS]
    assert len(cache) == 4
    assert cache.find(other, 1000) == cache.find(SYSTEM, 1000) == 3 * BLOCK_TOKENS


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(4 * BLOCK_BYTES)
    first, second, third = ([k] * (2 * BLOCK_TOKENS) for k in (1, 2, 3))
    keep(cache, first)
    keep(cache, second)
    cache.take(first, 1000)
    keep(cache, third)
    assert cache.find(first, 1000) == cache.find(third, 1000) == 2 * BLOCK_TOKENS
    assert cache.find(second, 1000) == 0
    # A beginning is kept longer than what follows it.
    keep(cache, [4] * BLOCK_TOKENS)
    assert cache.find(first, 1000) == BLOCK_TOKENS


def test_a_text_never_drops_its_own_beginning():
    cache = PrefixCache(2 * BLOCK_BYTES)
    keep(cache, SYSTEM)
    assert cache.find(SYSTEM, 1000) == 2 * BLOCK_TOKENS
    keep(cache, SYSTEM)
    assert cache.find(SYSTEM, 1000) == 2 * BLOCK_TOKENS
    small = PrefixCache(BLOCK_BYTES - 1)
    keep(small, SYSTEM)
    assert len(small) == small.bytes_in_use == 0


def test_a_failed_read_loses_nothing():
    cache = PrefixCache(100 * BLOCK_BYTES)

    def read(begin, end):
        if begin:
            raise MemoryError
        return block(begin)

    with pytest.raises(MemoryError):
        cache.keep(SYSTEM, read)
    assert (len(cache), cache.bytes_in_use) == (1, BLOCK_BYTES)
    keep(cache, SYSTEM)
    assert cache.find(SYSTEM, 1000) == len(SYSTEM)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 2), min_size=0, max_size=4)), max_size=30
    ),
    st.integers(1, 6),
)
def test_random_use_against_a_list_of_texts(steps, room):
    """Texts are lists of blocks, each of one repeated token."""
    cache = PrefixCache(room * BLOCK_BYTES)
    kept: list[list[int]] = []
    for is_kept, text in steps:
        tokens = [token for token in text for _ in range(BLOCK_TOKENS)]
        known = [list(held[:n]) for held in kept for n in range(len(held) + 1)] or [[]]
        longest = max((p for p in known if text[: len(p)] == p), key=len)
        assert cache.find(tokens, len(tokens)) <= BLOCK_TOKENS * len(longest)
        if is_kept:
            version, before = cache.version, cache.find(tokens, len(tokens))
            keep(cache, tokens)
            kept.append(text)
            found = cache.find(tokens, len(tokens))
            assert found == BLOCK_TOKENS * min(len(text), max(room, before // BLOCK_TOKENS))
            assert found == before or cache.version != version
        else:
            taken = cache.take(tokens, len(tokens))
            starts = [content.key[0, 0, 0, 0].item() for content in taken]
            assert starts == [BLOCK_TOKENS * i for i in range(len(taken))]
        assert cache.bytes_in_use == BLOCK_BYTES * len(cache) <= cache.max_bytes


# In a relay.


def prompts() -> list[list[int]]:
    """Some share a long beginning, some a part of it, and one nothing."""
    generator = random.Random(1)
    tails = [[generator.randrange(47) for _ in range(n)] for n in (5, 1, 40, 9, 3, 30, 8)]
    heads = [SYSTEM, SYSTEM, SYSTEM[:70], [], SYSTEM, SYSTEM[:BLOCK_TOKENS], SYSTEM]
    return [head + tail for head, tail in zip(heads, tails, strict=True)]


SIZES = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 32,
    "max_position_embeddings": 512, "vocab_size": 61,
}  # fmt: skip


def logits_of(model, texts, num_slots=2, **options):
    """Per query the logits of all its tokens; and the relay's counters."""
    logits: dict[int, list[torch.Tensor]] = {}
    with Relay(model, num_slots, 400, **options) as relay:
        relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(
            row.clone()
        )
        queries = [relay.submit(text, max_new_tokens=12) for text in texts]
        relay.run()
        assert_empty(relay)
        assert relay.prefix_bytes <= (options.get("prefix_cache") or 0)
    assert all(len(query.tokens) == 12 for query in queries)
    return [torch.stack(logits[query.id]) for query in queries], relay.counters


@pytest.mark.parametrize("isa", available_cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_hit_has_the_bits_of_a_miss(dtype, isa):
    model = make_model(dtype, **SIZES)
    with cpu_isa(isa):
        expected, without = logits_of(model, prompts())
        got, counters = logits_of(model, prompts(), prefix_cache=2**24)
    assert without.reused_tokens == without.reusing_queries == 0
    # Two rows: the first two queries enter at once, and the others reuse what those have left.
    assert counters.reusing_queries >= 4
    assert counters.reused_tokens >= 2 * len(SYSTEM)
    assert counters.prompt_tokens + counters.reused_tokens == without.prompt_tokens
    for query, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), query


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("prefill", ["serial", "overlapped"])
def test_every_policy_reuses_and_answers_the_same(policy, prefill):
    model = make_model(torch.bfloat16, **SIZES)
    expected, _ = logits_of(model, prompts())
    options = {"policy": policy, "prefill": prefill, "prefix_cache": 2**24}
    got, counters = logits_of(model, prompts(), **options)
    assert counters.reused_tokens > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_conversation_goes_on_from_its_own_answers():
    model = make_model(torch.bfloat16, **SIZES)
    with Relay(model, 2, 400, prefix_cache=2**24) as relay:
        first = relay.submit(SYSTEM[:50], max_new_tokens=60)
        relay.run()
        follow_up = first.prompt + first.tokens + [3, 4, 5]
        second = relay.submit(follow_up, max_new_tokens=5)
        relay.run()
        # Everything but the answer's last token has been computed: 109 tokens, in blocks of 32.
        assert relay.counters.reused_tokens == 3 * BLOCK_TOKENS
    with Relay(model, 1, 400) as relay:
        again = relay.submit(follow_up, max_new_tokens=5)
        relay.run()
    assert second.tokens == again.tokens


def test_the_same_prompt_again_computes_its_last_tokens():
    model = FakeLlama()
    relay = Relay(model, 2, 120, prefix_cache=2**20)
    for _ in range(3):
        query = relay.submit(SYSTEM, max_new_tokens=3, eos=None)
        relay.run()
    # The logits after the last token are needed, so the last block is not copied.
    assert relay.counters.reused_tokens == 2 * 2 * BLOCK_TOKENS
    assert relay.counters.prompt_tokens == len(SYSTEM) + 2 * BLOCK_TOKENS
    fresh = Relay(model, 1, 120)
    again = fresh.submit(SYSTEM, max_new_tokens=3, eos=None)
    fresh.run()
    assert query.tokens == again.tokens


def test_running_queries_are_found_too():
    relay = Relay(FakeLlama(), 2, 120, prefix_cache=2**20)
    relay.submit([*SYSTEM, 1], max_new_tokens=10, eos=None)
    relay.step()
    relay.submit([*SYSTEM, 2], max_new_tokens=2, eos=None)
    relay.run()
    assert relay.counters.reused_tokens == len(SYSTEM)


def test_off_nothing_is_kept_or_looked_up():
    relay = Relay(FakeLlama(), 2, 120)
    for _ in range(2):
        relay.submit(SYSTEM, max_new_tokens=3, eos=None)
        relay.run()
    assert relay._batch.slots.prefixes is None and relay.prefix_bytes == 0
    assert relay.counters.reused_tokens == 0


def test_a_small_cache_stays_small():
    model = FakeLlama()
    per_token = Relay(model, 1, 8).cache.bytes_per_token
    relay = Relay(model, 3, 120, prefix_cache=2 * BLOCK_TOKENS * per_token)
    generator = random.Random(0)
    for _ in range(20):
        head = [generator.randrange(3)] * BLOCK_TOKENS * generator.randrange(1, 4)
        relay.submit([*head, 5], max_new_tokens=2, eos=None)
        relay.step()
        assert relay.prefix_bytes <= 2 * BLOCK_TOKENS * per_token
    assert all(query.status == "finished" for query in relay.run())
    assert relay.counters.reused_tokens > 0


def test_the_budget_of_rows_holds():
    model = FakeLlama()
    per_token = Relay(model, 1, 8).cache.bytes_per_token
    budget = 220 * per_token
    relay = Relay(model, 4, 120, prefix_cache=2**20, kv_budget=budget)
    watch_budget(relay, budget)
    queries = [relay.submit([*SYSTEM, n], max_new_tokens=8, eos=None) for n in range(6)]
    relay.run()
    alone = Relay(model, 1, 120)
    for query in queries:
        again = alone.submit(query.prompt, max_new_tokens=8, eos=None)
        alone.run()
        assert query.tokens == again.tokens
    assert relay.counters.reused_tokens > 0


def test_blocks_dropped_between_the_look_and_the_row_are_computed():
    model = FakeLlama()
    relay = Relay(model, 2, 120, prefix_cache=2**20)
    relay.submit(SYSTEM, max_new_tokens=1, eos=None)
    relay.run()
    slots = relay._batch.slots
    look_up = slots.look_up

    def look_and_lose(query):
        look_up(query)
        assert query.cached == 2 * BLOCK_TOKENS
        while len(slots.prefixes) > 1:
            slots.prefixes._drop(next(iter(slots.prefixes._used)))

    slots.look_up = look_and_lose
    query = relay.submit(SYSTEM, max_new_tokens=4, eos=None)
    relay.step()
    slots.look_up = look_up
    relay.run()
    fresh = Relay(model, 1, 120)
    again = fresh.submit(SYSTEM, max_new_tokens=4, eos=None)
    fresh.run()
    assert query.tokens == again.tokens and len(query.tokens) == 4


def test_keys_of_a_failed_query_are_not_kept():
    model = FakeLlama()
    model.bad_row = lambda tokens: tokens[-1] == 46
    relay = Relay(model, 1, 120, prefix_cache=2**20)
    query = relay.submit([*SYSTEM[:40], 46], max_new_tokens=2, eos=None)
    relay.run()
    assert query.status == "failed" and relay.prefix_bytes == 0


def test_without_memory_for_a_block_the_query_goes_on(monkeypatch):
    relay = Relay(FakeLlama(), 1, 120, prefix_cache=2**20)

    def refuse(tokens, read):
        raise MemoryError

    monkeypatch.setattr(relay._batch.slots.prefixes, "keep", refuse)
    query = relay.submit(SYSTEM, max_new_tokens=2, eos=None)
    relay.run()
    assert query.status == "finished" and len(query.tokens) == 2


def test_answers_to_one_prompt_reuse_its_beginning():
    model = FakeLlama()
    relay = Relay(model, 3, 120, prefix_cache=2**20)
    relay.submit(SYSTEM, max_new_tokens=1, eos=None)
    relay.run()
    options = {"temperature": 1.2, "max_new_tokens": 4, "eos": None}
    queries = relay.submit_n([*SYSTEM, 1], 3, seed=5, **options)
    relay.run()
    assert relay.counters.reused_tokens == len(SYSTEM)
    alone = Relay(model, 1, 120)
    for seed, query in enumerate(queries, start=5):
        again = alone.submit(query.prompt, seed=seed, **options)
        alone.run()
        assert query.tokens == again.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache": 0}, "prefix_cache must be at least 1, got 0"),
        ({"prefix_cache": 1, "aligned": True}, "prefix_cache must be None in an aligned cache"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Relay(FakeLlama(), 1, 16, **options)
