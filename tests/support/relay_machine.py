"""Random mixes of everything that can happen to a relay, compared with each query by itself.

After every rule no query holds a slot wrongly, and the accounting agrees with the queries; at the
end nothing is left.
"""

import itertools

import policy_settings
from counted import EVENTS, rule
from faulty_llama import BAD, INJECTED, POISON, FaultyLlama
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition

from baton_engines import policies
from baton_engines.relay import Query, Relay
from baton_engines.slots.prefix_cache import PrefixCache
from baton_engines.testing import FakeLlama

CAPACITY = 32
# Bytes of a FakeLlama's token: in 8 bits an element has one byte, and each head a scale.
BYTES_PER_TOKEN, EIGHT_BIT_BYTES = 256, 80
INDEX = st.integers(0, 1000)
# Prompts with a common beginning, and a prefix cache of a few small blocks.
ALIKE = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
BLOCK_TOKENS = 3
PROMPTS = st.builds(
    lambda alike, rest: [*ALIKE[:alike], *rest][:12],
    st.integers(0, 12),
    st.lists(st.integers(0, 47), min_size=1, max_size=12),
)


class CallbackError(Exception):
    pass


def any_settings(bytes_per_token: int = BYTES_PER_TOKEN):
    """Arguments of a relay with any policy."""
    return st.sampled_from(policies.NAMES).flatmap(
        lambda name: policy_settings.settings(name, CAPACITY, bytes_per_token)
    )


class RelayMachine(RuleBasedStateMachine):
    """Queries of a FaultyLlama: a prompt's first token decides what its forwards do."""

    @initialize(
        settings=any_settings()
        | st.builds(
            lambda settings, dtype: {**settings, "kv_dtype": dtype},
            any_settings(EIGHT_BIT_BYTES),
            st.sampled_from(["int8", "float8_e4m3fn"]),
        ),
        blocks=st.none() | st.integers(1, 8),
    )
    def start(self, settings, blocks):
        self.settings = settings
        self.model = FaultyLlama()
        self.relay = Relay(self.model, capacity=CAPACITY, **settings)
        policy_settings.watch_budget(self.relay, settings["kv_budget"])
        self.prefix_bytes = 0
        if blocks is not None and not settings["aligned"]:
            self.prefix_bytes = blocks * BLOCK_TOKENS * self.relay.cache.bytes_per_token
            prefixes = PrefixCache(self.prefix_bytes, BLOCK_TOKENS)
            self.relay._batch.slots.prefixes = prefixes
        self.queries: list[Query] = []
        self.options: dict[int, dict] = {}
        self.heard: dict[int, list[int]] = {}
        self.doomed: dict[int, type[Exception]] = {}

    def add(self, prompt, on_token=None, **options) -> Query:
        def callback(query, token):
            self.hear(query, token)
            if on_token is not None:
                on_token(query)

        query = self.relay.submit(prompt, on_token=callback, **options)
        self.queries.append(query)
        self.options[query.id] = options
        return query

    def hear(self, query, token):
        self.heard.setdefault(query.id, []).append(token)

    @rule(prompt=PROMPTS, count=st.integers(1, 20), priority=st.integers(0, 3))
    def submit(self, prompt, count, priority):
        self.add(prompt, max_new_tokens=count, priority=priority)

    @rule(prompt=PROMPTS, count=st.integers(2, 10), first=st.sampled_from([POISON, BAD]))
    def submit_faulty(self, prompt, count, first):
        query = self.add([first, *prompt], max_new_tokens=count)
        if first == POISON or len(query.prompt) + count - 1 > 6:
            self.doomed[query.id] = RuntimeError if first == POISON else FloatingPointError

    @rule(prompt=st.one_of(st.just([]), st.just([50]), st.just([1] * 32)))
    def submit_impossible(self, prompt):
        query = self.add(prompt, max_new_tokens=1)
        assert query.status == "failed"
        self.doomed[query.id] = ValueError

    @rule(prompt=PROMPTS, count=st.integers(1, 10), at=st.integers(1, 10))
    def submit_raising(self, prompt, count, at):
        def raise_at(query):
            if len(query.tokens) == at:
                INJECTED["callback"] += 1
                raise CallbackError("mine")

        query = self.add(prompt, on_token=raise_at, max_new_tokens=count)
        if at <= count:
            self.doomed[query.id] = RuntimeError

    @rule(
        prompt=PROMPTS,
        count=st.integers(1, 10),
        at=st.integers(1, 10),
        lever=st.sampled_from(["cancel", "preempt", "resume", "resize", "submit"]),
        index=INDEX,
    )
    def submit_meddling(self, prompt, count, at, lever, index):
        def meddle(query):
            if len(query.tokens) != at:
                return
            if lever == "resize":
                self.relay.resize(1 + index % 5)
            elif lever == "submit":
                self.add(prompt, max_new_tokens=count)
            else:
                getattr(self.relay, lever)(self.queries[index % len(self.queries)])

        self.add(prompt, on_token=meddle, max_new_tokens=count)

    @rule(prompt=PROMPTS, count=st.integers(1, 10), seed=st.integers(0, 3))
    def submit_sampled(self, prompt, count, seed):
        self.add(prompt, max_new_tokens=count, temperature=0.8, top_k=20, top_p=0.9, seed=seed)

    @rule(prompt=PROMPTS, count=st.integers(1, 10), n=st.integers(2, 4), seed=st.integers(0, 3))
    def submit_copies(self, prompt, count, n, seed):
        """Answers to one prompt, which is computed once; the others' rows are copies."""
        options = {"max_new_tokens": count, "temperature": 0.8}
        queries = self.relay.submit_n(prompt, n, seed=seed, on_token=self.hear, **options)
        self.queries += queries
        for number, query in enumerate(queries):
            self.options[query.id] = {**options, "seed": seed + number}

    @rule(steps=st.integers(1, 4), flaky=st.lists(st.booleans(), max_size=4))
    def step(self, steps, flaky):
        self.model.flaky = itertools.chain(flaky, itertools.repeat(False))
        for _ in range(steps):
            self.relay.step()

    @precondition(lambda self: self.queries)
    @rule(index=INDEX)
    def cancel(self, index):
        query = self.queries[index % len(self.queries)]
        ended = query.ended
        assert self.relay.cancel(query) is not ended

    @precondition(lambda self: self.queries)
    @rule(index=INDEX, lever=st.sampled_from(["preempt", "resume"]))
    def pull(self, index, lever):
        getattr(self.relay, lever)(self.queries[index % len(self.queries)])

    @rule(more=st.booleans())
    def announce(self, more):
        self.relay.more_to_come = more

    @rule(num_slots=st.integers(1, 5))
    def resize(self, num_slots):
        self.relay.resize(num_slots)

    @rule(at=st.integers(0, 5))
    def press_ctrl_c(self, at):
        fault, forwards = self.model.fault, itertools.count()

        def interrupt(rows):
            fault(rows)
            if next(forwards) == at:
                INJECTED["Ctrl-C"] += 1
                raise KeyboardInterrupt

        self.model.fault = interrupt
        try:
            for _ in range(3):
                self.relay.step()
        except KeyboardInterrupt:
            pass
        finally:
            self.model.fault = fault

    @invariant()
    def accounting_agrees(self):
        relay, shape = self.relay, self.relay.cache.shape
        holders = {query.slot: query for query in self.queries if query.slot is not None}
        assert set(shape.used) == set(holders)
        assert all(query.status == "running" for query in holders.values())
        for status, listed in (
            ("running", relay.running),
            ("waiting", relay.waiting),
            ("parked", relay.parked),
        ):
            assert set(listed) == {query for query in self.queries if query.status == status}
        assert len(relay.running) <= relay.num_slots
        used = sum(shape.length(slot) for slot in shape.used)
        assert relay.cache.bytes_in_use == used * relay.cache.bytes_per_token
        assert relay.cache.bytes_in_use <= (self.settings["kv_budget"] or relay.cache.bytes_in_use)
        parked = [query for query in self.queries if query.parked_kv is not None]
        assert all(query.slot is None and not query.ended for query in parked)
        shared = {query.shared_prompt for query in self.queries} - {None}
        kept = [len(prompt.leader.prompt) for prompt in shared if prompt.parked is not None]
        tokens = sum(query.cached for query in parked) + sum(kept)
        assert relay.parked_bytes == tokens * relay.cache.bytes_per_token
        assert relay.prefix_bytes <= self.prefix_bytes
        for query in self.queries:
            assert self.heard.get(query.id, []) == query.tokens
            assert query.ended == (query.finish_reason is not None)

    def teardown(self):
        if not hasattr(self, "relay"):
            return
        for _ in range(50):
            for query in self.relay.parked:
                self.relay.resume(query)
            self.relay.run()
            if not self.relay.parked:
                break
        self.accounting_agrees()
        assert self.relay.cache.bytes_committed == self.relay.parked_bytes == 0
        assert self.relay.cache.shape.used == () and self.relay.cache.bytes_in_use == 0
        assert self.relay.waiting == self.relay.running == self.relay.parked == ()
        counters = self.relay.counters
        assert counters.finished + counters.cancelled + counters.failed == len(self.queries)
        self.count_events(counters)
        for query in self.queries:
            self.check(query)

    def count_events(self, counters):
        EVENTS["queries"] += len(self.queries)
        if "kv_dtype" in self.settings:
            EVENTS["queries with keys and values of eight bits"] += len(self.queries)
        EVENTS["rows parked"] += counters.preemptions
        EVENTS["parked rows that came back"] += counters.insertions
        EVENTS["changes of the number of slots"] += counters.resizes
        EVENTS["queries that copied a kept beginning"] += counters.reusing_queries
        EVENTS["prompts computed elsewhere"] += counters.prefills_elsewhere

    def check(self, query):
        assert query.ended
        if query.status == "finished":
            assert query.id not in self.doomed and len(query.tokens) == query.max_new_tokens
        elif query.status == "failed":
            assert isinstance(query.error, self.doomed[query.id])
        if "temperature" not in self.options[query.id]:
            assert query.tokens == FakeLlama().decode_alone(query.prompt, len(query.tokens))
            return
        relay = Relay(FakeLlama(), 1, 32)
        alone = relay.submit(query.prompt, **self.options[query.id])
        relay.run()
        assert query.tokens == alone.tokens[: len(query.tokens)]
