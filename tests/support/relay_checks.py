"""Shared by the tests of the relay: prompts, and what must hold afterwards."""

import random

from baton_engines.relay import Query, Relay
from baton_engines.testing import FakeLlama


def prompt(length: int, seed: int = 0, vocab_size: int = 50) -> list[int]:
    numbers = random.Random(1000 * seed + length)
    return [numbers.randrange(vocab_size) for _ in range(length)]


def assert_right(model: FakeLlama, queries: list[Query]) -> None:
    for query in queries:
        assert query.status == "finished", (query, query.error)
        assert query.tokens == model.decode_alone(query.prompt, query.max_new_tokens)
        assert query.finish_reason == "length"
        assert len(query.token_times) == len(query.tokens)


def assert_empty(relay: Relay) -> None:
    assert (relay.waiting, relay.running, relay.parked) == ((), (), ())
    assert relay.cache.shape.used == () and relay.cache.bytes_committed == 0
    assert relay.cache.bytes_in_use == 0 and not relay._loop.in_flight
