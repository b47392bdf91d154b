"""Relays with recorded CUDA graphs and without: shared by their tests."""

import itertools

from baton_engines.relay import Relay
from baton_kernels.testing import assert_same_bits


def ticks():
    """A clock with which every run is the same."""
    return itertools.count().__next__


def assert_nothing_failed(relay, runtime):
    """Checks that each step with graphs succeeded: a step that fails is computed without them, and
    its answer would not show it."""
    copies_in, replays, copies_out, waits, captures = runtime.counts
    assert relay.counters.replayed_steps == replays
    assert copies_in == copies_out == waits == replays + captures


def answers(model, graphs, *, count=6, num_slots=4, capacity=60, **options):
    """Tokens and logits of some queries."""
    logits = {}
    with Relay(model, num_slots, capacity, cuda_graphs=graphs, clock=ticks(), **options) as relay:
        relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(row)
        queries = [
            relay.submit([3 * n + 1, *range(n)], max_new_tokens=12 + 5 * n, eos=None)
            for n in range(count)
        ]
        relay.run()
        assert [query.error for query in queries] == [None] * count
        replayed = relay.counters.replayed_steps
        if graphs is not None and graphs.refuses is None:
            assert_nothing_failed(relay, graphs)
    return [query.tokens for query in queries], logits, replayed


def assert_same_answers(one, two):
    assert one[0] == two[0]
    for id, rows in one[1].items():
        for mine, theirs in zip(rows, two[1][id], strict=True):
            assert_same_bits(mine, theirs)


def decoding(relay, count, tokens=20, **options):
    """Queries whose prompts are computed, so that only decode steps are left."""
    queries = [
        relay.submit([n + 1, 2], max_new_tokens=tokens, eos=None, **options) for n in range(count)
    ]
    while not all(query.tokens or query.ended for query in queries):
        relay.step()
    return queries


def deltas(runtime, function):
    before = runtime.counts
    function()
    return tuple(b - a for a, b in zip(before, runtime.counts, strict=True))
