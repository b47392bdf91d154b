"""The relay: queries hand over the slots of a running batch between two decode steps.

In one iteration (`Relay.step`) the policy decides which queries enter and what is computed;
newcomers prefill straight into their slots, parked queries are copied back, and all running queries
decode one token, in the same forward or in the next one. A relay belongs to one thread: a call that
comes while another thread is in one raises RuntimeError. Callbacks may call `submit`, `cancel`,
`preempt`, `resume` and `resize`, which take effect at once, even in the middle of a step.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

from baton_kernels.batch_shape import checked_int

from .. import policies
from ..prefill import Prefiller
from ..query import Query, SharedPrompt
from ..query.callbacks import give_text
from .graphs import GraphRuntime
from .one_thread import one_thread
from .opening import open_loop
from .state import RelayState
from .streams import text_of, tokens_of
from .submission import MODEL_EOS, fill_query

__all__ = ["Query", "Relay"]


class Relay(RelayState):
    """Generates for many queries on one model; each gets the tokens it would get by itself.

    Args:
        model: a causal language model of transformers, computed through `patch_llama` where that
            supports it, else through `AnyModel`, until the last relay on it is closed or dropped;
            or a handle of either.
        num_slots: int, at least 1; the most queries that run at a time.
        capacity: int, at least 1; the most tokens of a query, prompt and answer together. Default:
            the model's `max_position_embeddings`.
        policy: one of `policies.NAMES`, or a `Policy` object that no other relay uses.
        tokenizer: of Hugging Face; for stop strings, `Query.text` and streams of text.
        generation_config: a transformers GenerationConfig instead of the model's own; settings
            that it leaves unset stay unset.
        aligned: keep all rows ending in one column, as the paper does: same results, more copies.
        prefill: where newcomers' prompts are computed: one of `prefill.NAMES`, or a `Prefiller`
            that no other relay uses. "serial": in the loop, between two steps. "overlapped": in a
            thread with separate cores, while the batch decodes with the others. "apart": in another
            process, which is restarted if it dies or hangs. "ray": in such processes on any node of
            a Ray cluster. Same results; a prompt that fails elsewhere is computed in the loop.
        shaping: what happens to the other rows of an aligned cache when one enters or leaves:
            "in_place" moves what has to move, "concatenate" copies all into a new cache.
        kv_budget: upper limit of the bytes of keys and values in the rows (`cache.bytes_in_use`).
            When they would exceed it, queries are parked in host memory, beginning with the last in
            the policy's order of admission, and continue later without recomputing. Not counted are
            padding that aligns rows, parked queries (`parked_bytes`), and prompts computed
            elsewhere until they enter; room for the latter is reserved.
        kv_dtype: "int8" or "float8_e4m3fn": eight-bit keys and values, on a CPU, for models that
            `patch_llama` supports; this changes answers. None: the model's own dtype.
        prefix_cache: bytes for keys and values of earlier prompts and answers. A query that begins
            with the same tokens copies them instead of computing them, in units of 32 tokens. The
            least recently used are dropped first. They do not count towards kv_budget.
        max_slots: the number of slots grows up to this while queries wait, and shrinks back to
            num_slots when rows are not used; None keeps it fixed.
        weight_dtype: "int8" rounds the weights of a model on the CPU to int8, which takes half of
            bfloat16's memory and changes answers; see `patch_llama`. The model's own weights are
            lost, even when the relay is closed. None: the model's own weights.
        cuda_graphs: whether steps in which all rows decode are replayed as CUDA graphs, which
            saves launches and waits. None, the default: where model and device support it.
        clock: returns seconds.

    Attributes:
        policy: the `Policy` object.
        more_to_come: bool; set it while more queries will be submitted; a policy may then hold
            queries back in `step` to form larger batches. `run` and `stream` do not wait.

    Raises:
        ValueError: num_slots, capacity, kv_budget or prefix_cache is below 1, max_slots is below
            num_slots, a policy, shaping, weight_dtype or prefill mode does not exist, or they
            cannot be combined with the kind of cache or with a handle.
        NotImplementedError: the generation config has a setting that only `generate` supports; or
            kv_dtype is used with another model, device or prefill mode than "serial".
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
        generation_config=None,
        aligned: bool = False,
        shaping: str = "in_place",
        kv_budget: int | None = None,
        kv_dtype=None,
        prefix_cache: int | None = None,
        max_slots: int | None = None,
        weight_dtype=None,
        cuda_graphs: bool | GraphRuntime | None = None,
        prefill: str | Prefiller = "serial",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._in_use = threading.RLock()
        self.policy = policies.get(policy)
        self.more_to_come = False
        self._clock = clock
        self._tokenizer = tokenizer
        self._undo = contextlib.ExitStack()
        try:
            self._limits, self._batch, self._loop = open_loop(
                model,
                self.policy,
                self._undo,
                num_slots=num_slots,
                capacity=capacity,
                tokenizer=tokenizer,
                generation_config=generation_config,
                aligned=aligned,
                shaping=shaping,
                kv_budget=kv_budget,
                kv_dtype=kv_dtype,
                prefix_cache=prefix_cache,
                max_slots=max_slots,
                weight_dtype=weight_dtype,
                cuda_graphs=cuda_graphs,
                prefill=prefill,
                clock=clock,
                on_end=self._note_end,
            )
        except BaseException:
            self._undo.close()
            raise
        self._next_id = 0
        # Ended queries that `run` has not returned. Weak, so that a server that never calls `run`
        # keeps none of them alive. `_held` holds those of the current `run`, and those that have
        # failed in `submit` since the last step.
        self._ended: WeakValueDictionary[int, Query] = WeakValueDictionary()
        self._held: list[Query] = []
        self._holding = False
        self._closed = False
        # A dropped relay must not leave its patch behind; at the end of the program that is
        # harmless.
        weakref.finalize(self, self._undo.close).atexit = False

    @one_thread
    def submit(
        self,
        token_ids,
        *,
        max_new_tokens: int | None = None,
        priority: float = 0.0,
        eos=MODEL_EOS,
        stop=None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        suppress_tokens: Iterable[int] | None = None,
        min_new_tokens: int | None = None,
        logprobs: int | None = None,
        seed: int | None = None,
        on_token: Callable[[Query, int], object] | None = None,
        on_text: Callable[[Query, str], object] | None = None,
        name: object = None,
    ) -> Query:
        """Add a query to the waiting ones.

        Options that are None take their values from the generation config, as in `generate`;
        options that it does not set either change nothing, and the likeliest token is chosen.

        Args:
            token_ids: the prompt; integers, or a 1-D tensor or array of them.
            max_new_tokens: >= 1, default 128; prompt and answer together must fit the
                capacity and the budget.
            priority: finite; used by the admission "priority"; higher values enter first.
            eos: an id, several, or None to continue after an end-of-sequence token; default: the
                model's, the tokenizer's, and the one that ends a turn in its chat template.
            stop: a string or an id, or an iterable of strings, sequences of ids and single ids;
                strings need the relay's tokenizer. The match stays in `Query.tokens` and is cut
                from `Query.text`.
            temperature: 0 is greedy. A given one overrides a config that says to sample.
            top_p: as in Hugging Face; 1.0 keeps all.
            top_k: as in Hugging Face; 0 keeps all.
            min_p: as in Hugging Face; 0.0 keeps all.
            repetition_penalty: as in Hugging Face, for tokens of prompt and answer; 1.0 changes
                nothing.
            frequency_penalty: subtracted from the logits of the answer's tokens, per occurrence.
            presence_penalty: subtracted from the logits of the answer's tokens, once.
            logit_bias: maps token ids to numbers that are added to their logits.
            suppress_tokens: ids that are never chosen.
            min_new_tokens: no end-of-sequence id is chosen before that many tokens.
            logprobs: 0 to 100; record in `Query.logprobs` the logarithm of every token's
                probability and those of this many likeliest tokens.
            seed: of the query's own random numbers; default: the query's id, so that running a
                program again gives the same answers.
            on_token: called with the query and each generated token, once per token. If it raises,
                the query fails. It must not be async.
            on_text: called with the query and each piece of text that has become certain: complete
                characters, and nothing that a stop string could still withdraw. All pieces together
                are `Query.text`.
            name: kept as `Query.name`.

        Returns:
            The query. Invalid arguments do not raise: the query then has the status "failed", and
            `Query.error` holds the reason.

        Raises:
            RuntimeError: the relay is closed.
        """
        if self._closed:
            raise RuntimeError("Relay.submit: relay must be open, got a closed one")
        query = Query(self._next_id, self._clock(), name=name, tokenizer=self._tokenizer)
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
                sampling={
                    "temperature": temperature,
                    "top_p": top_p,
                    "top_k": top_k,
                    "min_p": min_p,
                    "repetition_penalty": repetition_penalty,
                    "frequency_penalty": frequency_penalty,
                    "presence_penalty": presence_penalty,
                    "logit_bias": logit_bias,
                    "suppress_tokens": suppress_tokens,
                    "min_new_tokens": min_new_tokens,
                    "logprobs": logprobs,
                    "seed": seed,
                },
                on_token=on_token,
                on_text=on_text,
            )
        except Exception as error:
            self._batch.fail(query, error)
            self._held.append(query)
        else:
            self._batch.wait(query)
        return query

    @one_thread
    def submit_n(
        self, token_ids, n: int, *, seed: int | None = None, **options: Any
    ) -> list[Query]:
        """Add n queries with one prompt, which is computed once; the others copy its row.

        Args:
            token_ids: the prompt.
            n: >= 1.
            seed: of the first query; the next one has seed + 1, and so on; default: as in `submit`.
            options: see `submit`. Greedy queries all give the same answer.

        Returns:
            The queries.

        Raises:
            ValueError: n is below 1.
            RuntimeError: the relay is closed.
        """
        n = checked_int("submit_n", "n", n, 1)
        queries = [
            self.submit(token_ids, seed=None if seed is None else seed + index, **options)
            for index in range(n)
        ]
        alive = [query for query in queries if not query.ended]
        if len(alive) > 1:
            SharedPrompt(alive)
        return queries

    @one_thread
    def step(self) -> bool:
        """One iteration: admit queries, compute newcomers' prompts or a part of them, and run one
        decode step of all running queries.

        Returns:
            Whether there is more to do. Parked queries do not count until they are resumed, nor do
            queries that the policy holds back while `more_to_come`.

        Raises:
            RuntimeError: called from a callback.
            ValueError: the policy's plan cannot be carried out.
        """
        self._between_steps("step")
        self._held.clear()
        return self._loop.iterate(self.more_to_come)

    @one_thread
    def run(self, progress: Callable[[Relay], object] | None = None) -> list[Query]:
        """Step until nothing is left to do.

        Args:
            progress: called with the relay after every step; if it raises, the run ends and can be
                continued later.

        Returns:
            The queries that ended since the last `run`, in order of submission. Of queries that
            ended outside of `run`, only those that the caller still holds are included.
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
        """The query's tokens as they come; steps the relay, so other queries advance too.

        The query goes on when the caller stops iterating; `cancel` ends it.

        Raises:
            Exception: the query's error if it fails, after its last token.
            RuntimeError: the query is parked and nothing else is left to do.
        """
        return tokens_of(query, lambda: self._step_for(query))

    def stream_text(self, query: Query) -> Iterator[str]:
        """The query's text in pieces, each as soon as it is certain; steps the relay like `stream`.

        A piece holds complete characters only, and nothing that an incomplete stop string could
        withdraw; all pieces together are `Query.text`.

        Raises:
            ValueError: the relay has no tokenizer.
            Exception: see `stream`.
        """
        if self._tokenizer is None:
            raise ValueError("Relay.stream_text: relay must have a tokenizer, got none")
        return text_of(query, self._tokenizer, lambda: self._step_for(query))

    @one_thread
    def cancel(self, query: Query) -> bool:
        """End the query now, without another token, and free its slot. False if it had ended."""
        if self._batch.place(query) is None:
            return False
        listener = query.serving.listener
        if listener is not None:
            # Passes on the text that was held back, because the text ends here.
            self._batch.attempt(query, "on_text", give_text, query, listener, True)
        if not query.ended:
            self._batch.end(query, "cancelled", "cancelled")
        return True

    @one_thread
    def preempt(self, query: Query) -> bool:
        """Park the query until `resume`; its keys and values are kept in host memory.

        If another query's callback preempts a query before its own token of the step is out, that
        token is computed again later. False if the query had ended or is parked already.
        """
        place = self._batch.place(query)
        if place is None or place is self._batch.parked:
            return False
        self._batch.park(query)
        return True

    @one_thread
    def resume(self, query: Query) -> bool:
        """Let a parked query wait for a slot again, in its order of submission.

        Its keys and values are copied back, not recomputed. False if it was not parked.
        """
        if self._batch.place(query) is not self._batch.parked:
            return False
        self._batch.unpark(query)
        return True

    @one_thread
    def resize(self, num_slots: int) -> None:
        """Change the number of slots.

        Rows beyond it move to free slots. If there are not enough, their queries wait again; their
        keys and values are kept.

        Raises:
            ValueError: num_slots below 1.
        """
        num_slots = operator.index(num_slots)
        if num_slots < 1:
            raise ValueError(f"Relay.resize: num_slots must be >= 1, got {num_slots}")
        self._batch.resize(num_slots)

    @one_thread
    def close(self) -> None:
        """Cancel queries that have not ended, free the cache and undo the relay's own patch."""
        self._between_steps("close")
        batch = self._batch
        for queries in (batch.waiting, batch.running, batch.parked):
            for query in list(queries.values()):
                batch.end(query, "cancelled", "cancelled")
        self._closed = True
        batch.slots.cache.release()
        self._undo.close()

    def _step_for(self, query: Query) -> None:
        """One iteration for a caller that iterates over a query."""
        self._between_steps("stream")
        self._held.clear()
        if not self._loop.iterate() and not query.ended:
            raise RuntimeError(
                f"Relay.stream: query {query.id} must be resumed to go on, got "
                f"status {query.status!r}"
            )

    def _between_steps(self, where: str) -> None:
        if self._loop.stepping:
            raise RuntimeError(
                f"Relay.{where}: relay must be between two steps, got a call from a callback"
            )

    def _note_end(self, query: Query) -> None:
        self._ended[query.id] = query
        if self._holding:
            self._held.append(query)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
