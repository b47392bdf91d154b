"""A query's logits have the same bits wherever its prompt was computed: random arrivals, cancels
and preemptions on a small Llama, compared with a relay of one slot that prefills in its loop."""

import functools

import hypothesis
import torch
from hypothesis import strategies as st

from baton_engines.llama import PatchedLlama, patch_llama
from baton_engines.prefill import Overlapped
from baton_engines.relay import Query, Relay
from baton_engines.testing.prefill import ManualPrefiller
from baton_engines.testing.small_llama import VOCAB_SIZE, small_llama

CAPACITY = 40
STEP = st.none() | st.integers(1, 20)
ARRIVAL = st.tuples(
    st.integers(0, 10),  # the step before which it is submitted
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
    st.integers(1, 16),  # tokens of the answer
    STEP,  # before which it is cancelled
    STEP,  # before which it is preempted; it is resumed three steps later
)


@functools.cache
def llama() -> PatchedLlama:
    return patch_llama(small_llama(max_position_embeddings=64, attention_bias=True))


def record(relay: Relay) -> dict[int, list[torch.Tensor]]:
    logits: dict[int, list[torch.Tensor]] = {}
    relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(row.clone())
    return logits


@functools.cache
def alone(prompt: tuple[int, ...], count: int) -> torch.Tensor:
    with Relay(llama(), 1, CAPACITY) as relay:
        logits = record(relay)
        query = relay.submit(prompt, max_new_tokens=count, eos=None)
        relay.run()
        return torch.stack(logits[query.id])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    arrivals=st.lists(ARRIVAL, min_size=1, max_size=8),
    aligned=st.booleans(),
    make=st.sampled_from([ManualPrefiller, Overlapped]),
    workers=st.integers(1, 2),
    always=st.booleans(),
    threads=st.integers(1, 2),
    computed=st.lists(st.integers(0, 2), max_size=20),
)
def test_logits_have_the_bits_of_a_query_alone(
    arrivals, aligned, make, workers, always, threads, computed
):
    prefill = make(workers=workers, always=always)
    if make is Overlapped:
        prefill.threads = threads
    queries: dict[Query, tuple] = {}
    coming = sorted(arrivals, key=lambda arrival: arrival[0])
    with Relay(llama(), 3, CAPACITY, aligned=aligned, prefill=prefill) as relay:
        logits = record(relay)
        step = 0
        while coming or relay.waiting or relay.running or relay.parked:
            while coming and coming[0][0] <= step:
                arrival = coming.pop(0)
                query = relay.submit(arrival[1], max_new_tokens=arrival[2], eos=None)
                queries[query] = arrival
            for query, (_, _, _, cancel, preempt) in queries.items():
                if cancel == step:
                    relay.cancel(query)
                if preempt == step:
                    relay.preempt(query)
                if query.status == "parked" and step >= preempt + 3:
                    relay.resume(query)
            if make is ManualPrefiller:
                prefill.compute(computed.pop() if computed else 1)
            relay.step()
            step += 1
        assert relay.cache.shape.used == () and not relay._loop.in_flight
        assert relay.counters.prefill_faults == 0
    for query, (_, prompt, count, cancel, _) in queries.items():
        assert query.status == "finished" or (query.status == "cancelled" and cancel is not None)
        if query.tokens:
            expected = alone(tuple(prompt), count)[: len(query.tokens)]
            assert torch.equal(torch.stack(logits[query.id]), expected)
            assert query.tokens == expected.argmax(-1).tolist()
