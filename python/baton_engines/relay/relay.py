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
from dataclasses import replace
from weakref import WeakValueDictionary

from baton_kernels.batch_shape import checked_int

from .. import policies
from ..prefill import Prefiller
from ..prefill import get as get_prefiller
from ..query import Query
from ..slots import Slots
from .autoscale import Autoscale
from .batch import Batch
from .counters import Counters, Span, Timeline
from .decode_loop import DecodeLoop
from .in_flight import InFlight
from .submission import MODEL_EOS, Limits, fill_query

__all__ = ["Query", "Relay"]


class Relay:
    """Generates for many queries on one model, each as if it were alone.

    Args:
        model: a causal language model of transformers, in use until `close` through `patch_llama`
            where that supports it, else through `AnyModel`; or a handle of either.
        num_slots: int, at least 1; the most queries that run at a time.
        capacity: int, at least 1; the most tokens of a query, prompt and answer together. Default:
            the model's `max_position_embeddings`.
        policy: one of `policies.NAMES`, or a `Policy` object that no other relay uses.
        tokenizer: of Hugging Face; for stop strings and `Query.text`.
        aligned: keep all rows ending in one column, as the paper does: same results, more copies.
        prefill: where newcomers' prompts are computed, one of `prefill.NAMES`, or a `Prefiller`
            that no other relay uses. "serial": here, between two steps. "overlapped": by a thread
            with cores of its own, while the batch decodes with the others. "apart": by another
            process, which is restarted if it dies or hangs. Same results; a prompt that cannot be
            computed elsewhere is computed here.
        shaping: what happens to the other rows of an aligned cache when one enters or leaves:
            "in_place" moves what has to move, "concatenate" copies all into a new cache.
        kv_budget: bytes that the keys and values in the rows never exceed (`cache.bytes_in_use`);
            when they would, queries are parked in host memory, the last in the policy's order of
            admission first, and go on later without recomputing. Padding that aligns rows is not
            counted, nor what is parked (`parked_bytes`), nor a prompt computed elsewhere until it
            enters; room for it is kept.
        max_slots: the number of slots grows up to this while queries wait, and shrinks back to
            num_slots when rows are not used; None keeps it.
        clock: seconds.

    Attributes:
        policy: the `Policy` object.
        more_to_come: bool; set it while more queries will be submitted, and a policy may hold
            queries back in `step` to form larger batches. `run` and `stream` wait for nobody.

    Raises:
        ValueError: num_slots, capacity or kv_budget is below 1, max_slots below num_slots, or there
            is no such policy, shaping or prefill mode, or they do not go with the kind of cache.
        Exception: what `huggingface.adapt` raises for a model that cannot be computed exactly.

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
        shaping: str = "in_place",
        kv_budget: int | None = None,
        max_slots: int | None = None,
        prefill: str | Prefiller = "serial",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.policy = policies.get(policy)
        autoscale = None
        if max_slots is not None:
            max_slots = checked_int("Relay", "max_slots", max_slots, num_slots)
            autoscale = Autoscale(num_slots, max_slots)
        if kv_budget is not None:
            kv_budget = checked_int("Relay", "kv_budget", kv_budget, 1)
        self.more_to_come = False
        self._clock = clock
        self._tokenizer = tokenizer
        self._undo = contextlib.ExitStack()
        if not hasattr(model, "new_cache"):
            # Here and not above: a handle of another kind needs no transformers.
            from ..huggingface import adapt

            model = self._undo.enter_context(adapt(model))
        try:
            limits = Limits.of_model(model, capacity)
            slots = Slots(
                model,
                num_slots,
                limits.capacity,
                aligned=aligned,
                shaping=shaping,
                padded=self.policy.pads,
                kv_budget=kv_budget,
            )
            if slots.whole_prompts and self.policy.splits_prompts:
                raise ValueError(
                    f"Relay: policy must compute prompts whole in an aligned cache and under "
                    f"dynamic RoPE, got {self.policy.name}, which splits them"
                )
            prefiller = get_prefiller(prefill)
            prefiller.open(model)
            # Before the patch is undone: the workers use it.
            self._undo.callback(prefiller.close)
        except BaseException:
            self._undo.close()
            raise
        self._limits = replace(
            limits, kv_budget=kv_budget, bytes_per_token=slots.cache.bytes_per_token
        )
        self._batch = Batch(slots, self.policy, clock, self._note_end)
        self._loop = DecodeLoop(self._batch, InFlight(self._batch, prefiller), autoscale)
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
        return self._batch.slots.cache

    @property
    def counters(self) -> Counters:
        """What the relay has done."""
        return self._batch.counters

    @property
    def num_slots(self) -> int:
        """The most queries that run at a time."""
        return self._batch.slots.num_slots

    @property
    def waiting(self) -> tuple[Query, ...]:
        """Queries that wait for a slot, in order of submission."""
        return tuple(self._batch.waiting.values())

    @property
    def running(self) -> tuple[Query, ...]:
        """Queries in the batch, in order of admission."""
        return tuple(self._batch.running.values())

    @property
    def parked(self) -> tuple[Query, ...]:
        """Preempted queries that wait for `resume`."""
        return tuple(self._batch.parked.values())

    @property
    def parked_bytes(self) -> int:
        """Bytes of the keys and values in host memory."""
        return self._batch.slots.parked_bytes

    @property
    def timeline(self) -> list[Span]:
        """Who held which slot when, a span split by each stall; the newest 16384 spans."""
        return self._batch.timeline.spans(self._clock())

    def submit(
        self,
        token_ids,
        *,
        max_new_tokens: int = 128,
        priority: float = 0.0,
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
            max_new_tokens: >= 1; prompt and answer together must fit the capacity and the budget.
            priority: finite; what the admission "priority" goes by, more before less.
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
                priority=priority,
                eos=eos,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
            )
        except Exception as error:
            self._batch.fail(query, error)
            self._held.append(query)
        else:
            self._batch.wait(query)
        return query

    def step(self) -> bool:
        """One iteration: admit, prefill newcomers, one decode step of all running queries.

        Returns:
            Whether there is more to do. Parked queries are nothing to do until they are resumed,
            nor are those that the policy holds back while `more_to_come`.

        Raises:
            RuntimeError: called from a callback.
            ValueError: the policy's plan cannot be carried out.
        """
        self._between_steps("step")
        self._held.clear()
        return self._loop.iterate(self.more_to_come)

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
            self._between_steps("stream")
            self._held.clear()
            if not self._loop.iterate() and not query.ended:
                raise RuntimeError(
                    f"stream: query {query.id} must be resumed to go on, "
                    f"got status {query.status!r}"
                )
        if query.error is not None:
            raise query.error.with_traceback(None)

    def cancel(self, query: Query) -> bool:
        """End the query now, without another token, and free its slot. False if it had ended."""
        if self._batch.place(query) is None:
            return False
        self._batch.end(query, "cancelled", "cancelled")
        return True

    def preempt(self, query: Query) -> bool:
        """Park the query until `resume`; its keys and values are kept in host memory.

        A query that another one's callback preempts before its own token of the step is out
        computes that one token again. False if it had ended or is parked already.
        """
        place = self._batch.place(query)
        if place is None or place is self._batch.parked:
            return False
        self._batch.park(query)
        return True

    def resume(self, query: Query) -> bool:
        """Let a parked query wait for a slot again, in its order of submission.

        Its keys and values are copied back, not recomputed. False if it was not parked.
        """
        if self._batch.place(query) is not self._batch.parked:
            return False
        self._batch.unpark(query)
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
        self._batch.resize(num_slots)

    def reset_counters(self) -> None:
        """Start counters and timeline anew, for a measurement after a warm-up."""
        self._batch.counters = Counters()
        self._batch.timeline = Timeline()

    def summary(self) -> dict:
        """Policy, prefill mode, slots, rates, latencies in seconds, the idle split and all
        counters, by name."""
        mode = self._loop.in_flight.prefiller.name
        about = {"policy": self.policy.name, "prefill": mode, "num_slots": self.num_slots}
        return {**about, **self.counters.summary()}

    def close(self) -> None:
        """Cancel what has not ended, give the cache's memory back, undo the relay's own patch."""
        self._between_steps("close")
        batch = self._batch
        for queries in (batch.waiting, batch.running, batch.parked):
            for query in list(queries.values()):
                batch.end(query, "cancelled", "cancelled")
        self._closed = True
        batch.slots.cache.release()
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
