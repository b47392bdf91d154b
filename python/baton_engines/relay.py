"""The relay: queries hand over the slots of a running batch between two decode steps.

One iteration (`Relay.step`): the policy says who enters; newcomers prefill straight into their
slots, parked queries are copied back; then all running queries decode one token. A relay belongs to
one thread. Its methods may be called from callbacks: `submit`, `cancel`, `preempt`, `resume` and
`resize` take effect at once, in the middle of a step too.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterator
from weakref import WeakValueDictionary

from . import policies
from .counters import Counters, Span, Timeline
from .decode_loop import DecodeLoop
from .query import Query
from .slots import Slots
from .submission import MODEL_EOS, Limits, fill_query

__all__ = ["Query", "Relay"]


class Relay:
    """Generates for many queries on one model, each as if it were alone.

    Args:
        model: LlamaForCausalLM (patched until `close`) or PatchedLlama.
        num_slots: int, at least 1; the most queries that run at a time.
        capacity: int, at least 1; the most tokens of a query, prompt and answer together. Default:
            the model's `max_position_embeddings`.
        policy: one of `policies.NAMES`, or a `Policy` object that no other relay uses.
        tokenizer: of Hugging Face; for stop strings and `Query.text`.
        aligned: keep all rows ending in one column, as the paper does: same results, more copies.
        clock: seconds.

    Attributes:
        policy: the `Policy` object.

    Raises:
        ValueError: num_slots or capacity is below 1, or there is no such policy.
        Exception: what `patch_llama` raises for a model that it does not know.

    Source: BATON, dynamic re-batching.
    """

    def __init__(
        self,
        model,
        num_slots: int = 16,
        capacity: int | None = None,
        policy: str | policies.Policy = "baton",
        *,
        tokenizer=None,
        aligned: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.policy = policies.get(policy)
        self._clock = clock
        self._tokenizer = tokenizer
        self._undo = contextlib.ExitStack()
        if not hasattr(model, "new_cache"):
            # Here and not above: a handle of another kind needs no transformers.
            from .llama import patch_llama

            model = self._undo.enter_context(patch_llama(model))
        try:
            self._limits = Limits.of_model(model, capacity)
            slots = Slots(model, num_slots, self._limits.capacity, aligned=aligned)
        except BaseException:
            self._undo.close()
            raise
        self._loop = DecodeLoop(slots, self.policy, clock, self._note_end)
        self._next_id = 0
        # Ended queries that `run` has not returned. Weak, so that a server that never calls `run`
        # keeps none of them alive; `_held` has those of the current `run`, and those that have
        # failed in `submit` since the last step.
        self._ended: WeakValueDictionary[int, Query] = WeakValueDictionary()
        self._held: list[Query] = []
        self._holding = False
        self._closed = False

    @property
    def cache(self):
        """The KVCache, for reading."""
        return self._loop.slots.cache

    @property
    def counters(self) -> Counters:
        """What the relay has done."""
        return self._loop.counters

    @property
    def num_slots(self) -> int:
        """The most queries that run at a time."""
        return self._loop.slots.num_slots

    @property
    def waiting(self) -> tuple[Query, ...]:
        """Queries that wait for a slot, in order of submission."""
        return tuple(self._loop.waiting.values())

    @property
    def running(self) -> tuple[Query, ...]:
        """Queries in the batch, in order of admission."""
        return tuple(self._loop.running.values())

    @property
    def parked(self) -> tuple[Query, ...]:
        """Preempted queries that wait for `resume`."""
        return tuple(self._loop.parked.values())

    @property
    def timeline(self) -> list[Span]:
        """Who held which slot when, a span split by each stall; the newest 16384 spans."""
        return self._loop.timeline.spans(self._clock())

    def submit(
        self,
        token_ids,
        *,
        max_new_tokens: int = 128,
        eos=MODEL_EOS,
        stop=(),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        on_token: Callable[[Query, int], object] | None = None,
        name: object = None,
    ) -> Query:
        """Add a query to those that wait.

        Args:
            token_ids: the prompt; integers, or a 1-D tensor or array of them.
            max_new_tokens: >= 1; prompt and answer together must fit the capacity.
            eos: an id, several, or None to go on after an end-of-sequence token; default: the
                model's.
            stop: a string or an id, or an iterable of strings, sequences of ids and single ids;
                strings need the relay's tokenizer. What matched stays in `Query.tokens` and is cut
                from `Query.text`.
            temperature: 0 is greedy.
            top_p, top_k: as in Hugging Face; 1.0 and 0 keep all.
            seed: of the query's own random numbers; default: the query's id, so that a program
                repeats itself.
            on_token: called with the query and each generated token, once per token. If it raises,
                the query fails.
            name: kept as `Query.name`.

        Returns:
            The query. What is wrong with it is no exception: it has failed, and `Query.error` says
            why.

        Raises:
            RuntimeError: the relay is closed.
        """
        if self._closed:
            raise RuntimeError("submit: relay must be open, got a closed one")
        query = Query(
            self._next_id, self._clock(), name=name, on_token=on_token, tokenizer=self._tokenizer
        )
        self._next_id += 1
        self.counters.submitted += 1
        try:
            fill_query(
                query,
                self._limits,
                token_ids=token_ids,
                max_new_tokens=max_new_tokens,
                eos=eos,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
            )
        except Exception as error:
            self._loop.fail(query, error)
            self._held.append(query)
        else:
            self._loop.wait(query)
        return query

    def step(self) -> bool:
        """One iteration: admit, prefill newcomers, one decode step of all running queries.

        Returns:
            Whether there is more to do. Parked queries are nothing to do until they are resumed.

        Raises:
            RuntimeError: called from a callback.
            ValueError: the policy's plan cannot be carried out.
        """
        self._between_steps("step")
        self._held.clear()
        return self._loop.iterate()

    def run(self, progress: Callable[[Relay], object] | None = None) -> list[Query]:
        """Step until nothing is left to do.

        Args:
            progress: called with the relay after every step; what it raises ends the run, which can
                be taken up again.

        Returns:
            The queries that ended since the last `run`, in order of submission; of those that ended
            outside of `run`, the ones that the caller still holds.
        """
        self._between_steps("run")
        self._holding = True
        try:
            more = True
            while more:
                more = self._loop.iterate()
                if progress is not None:
                    progress(self)
        finally:
            self._holding = False
        ended = sorted(self._ended.values(), key=lambda query: query.id)
        self._ended.clear()
        self._held.clear()
        return ended

    def stream(self, query: Query) -> Iterator[int]:
        """The query's tokens as they come; steps the relay, so the other queries go on too.

        The query runs on when the caller stops listening; `cancel` ends it.

        Raises:
            Exception: the query's error when it fails, after its last token.
            RuntimeError: the query is parked and nothing else is left to do.
        """
        given = 0
        while True:
            while given < len(query.tokens):
                yield query.tokens[given]
                given += 1
            if query.ended:
                break
            if not self.step() and not query.ended:
                raise RuntimeError(
                    f"stream: query {query.id} must be resumed to go on, "
                    f"got status {query.status!r}"
                )
        if query.error is not None:
            raise query.error.with_traceback(None)

    def cancel(self, query: Query) -> bool:
        """End the query now, without another token, and free its slot. False if it had ended."""
        if self._loop.place(query) is None:
            return False
        self._loop.end(query, "cancelled", "cancelled")
        return True

    def preempt(self, query: Query) -> bool:
        """Park the query until `resume`; its keys and values are kept in host memory.

        A query that another one's callback preempts before its own token of the step is out
        computes that one token again. False if it had ended or is parked already.
        """
        loop = self._loop
        place = loop.place(query)
        if place is None or place is loop.parked:
            return False
        if place is loop.running:
            loop.unseat(query)
        del loop.waiting[query.id]
        query.status = "parked"
        loop.parked[query.id] = query
        return True

    def resume(self, query: Query) -> bool:
        """Let a parked query wait for a slot again, in its order of submission.

        Its keys and values are copied back, not recomputed. False if it was not parked.
        """
        if self._loop.place(query) is not self._loop.parked:
            return False
        del self._loop.parked[query.id]
        self._loop.wait(query)
        return True

    def resize(self, num_slots: int) -> None:
        """Change the number of slots.

        Rows beyond it move to free slots; where there is none, their queries wait again, keys and
        values kept.

        Raises:
            ValueError: num_slots below 1.
        """
        num_slots = operator.index(num_slots)
        if num_slots < 1:
            raise ValueError(f"resize: num_slots must be >= 1, got {num_slots}")
        loop = self._loop
        # Those that were admitted in this step and have no row yet are the first to wait again.
        in_order = sorted(loop.running.values(), key=lambda q: (q.slot is None, q.slot or 0))
        for query in in_order[num_slots:]:
            loop.unseat(query)
        for query in in_order[:num_slots]:
            if query.slot is not None and query.slot >= num_slots:
                loop.attempt(query, "relocation", loop.slots.relocate, query)
        loop.slots.cache.resize(num_slots)

    def reset_counters(self) -> None:
        """Start counters and timeline anew, for a measurement after a warm-up."""
        self._loop.counters = Counters()
        self._loop.timeline = Timeline()

    def summary(self) -> dict:
        """Policy, slots, rates, latencies in seconds, the idle split and all counters, by name."""
        return {"policy": self.policy.name, "num_slots": self.num_slots, **self.counters.summary()}

    def close(self) -> None:
        """Cancel what has not ended, give the cache's memory back, undo the relay's own patch."""
        self._between_steps("close")
        loop = self._loop
        for queries in (loop.waiting, loop.running, loop.parked):
            for query in list(queries.values()):
                loop.end(query, "cancelled", "cancelled")
        self._closed = True
        loop.slots.cache.release()
        self._undo.close()

    def _between_steps(self, where: str) -> None:
        if self._loop.stepping:
            raise RuntimeError(
                f"{where}: relay must be between two steps, got a call from a callback"
            )

    def _note_end(self, query: Query) -> None:
        self._ended[query.id] = query
        if self._holding:
            self._held.append(query)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
