"""Creates a query from the arguments of `Relay.submit`, or reports what is wrong with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..llama.handle import ModelHandle
from ..query import Query
from ..query.callbacks import check_callback
from ..query.chat import end_of_turn
from ..query.generation_defaults import GenerationDefaults
from ..query.sampler import Sampler
from ..query.sampling_options import make_options
from ..query.serving import Serving, TextListener
from ..query.stopping import TextPieces, make_stopper

# The default of `eos`, the model's own ids. It cannot be None, which means no ids.
MODEL_EOS = "model"


@dataclass(frozen=True)
class Limits:
    """Limits that a model and a cache set for queries.

    Attributes:
        capacity: the most tokens of a query.
        vocab_size: token ids are below this.
        defaults: the settings of the model's generation config and of the tokenizer.
        kv_budget: the most bytes of keys and values; None without a limit.
        bytes_per_token: bytes of one token's keys and values.
    """

    capacity: int
    vocab_size: int
    defaults: GenerationDefaults
    kv_budget: int | None = None
    bytes_per_token: int = 0

    @classmethod
    def of_model(
        cls, handle: ModelHandle, capacity: int | None, tokenizer=None, generation_config=None
    ) -> Limits:
        """The limits of a model and a capacity, by default the model's longest input.

        Args:
            handle: of the model.
            capacity: in tokens, or None.
            tokenizer: its end-of-sequence token and the end of the assistant's turn also end a
                query.
            generation_config: replaces the model's own.

        Raises:
            NotImplementedError: see `GenerationDefaults.of`.
        """
        config = handle.model.config
        if capacity is None:
            capacity = config.max_position_embeddings
        if generation_config is None:
            generation_config = getattr(handle.model, "generation_config", None)
        defaults = GenerationDefaults.of(generation_config, config.eos_token_id)
        ends: tuple[object, ...] = ()
        if tokenizer is not None:
            ends = (getattr(tokenizer, "eos_token_id", None), end_of_turn(tokenizer))
        own = [id for id in ends if isinstance(id, int) and id < handle.vocab_size]
        defaults = replace(defaults, eos=tuple(dict.fromkeys((*defaults.eos, *own))))
        return cls(capacity, handle.vocab_size, defaults)


def fill_query(
    query: Query,
    limits: Limits,
    *,
    token_ids,
    max_new_tokens: int | None,
    priority: float,
    eos,
    stop,
    sampling: Mapping[str, object],
    on_token: Callable[[Query, int], object] | None,
    on_text: Callable[[Query, str], object] | None,
) -> None:
    """Check everything and set the query up.

    Args:
        query: a new one. Written.
        limits: of the model and the cache.
        token_ids, max_new_tokens, priority, eos, stop, on_token, on_text: see `Relay.submit`.
        sampling: the other options, by the names of `SamplingOptions`.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """
    defaults = limits.defaults
    query.prompt = _prompt(token_ids, limits.vocab_size)
    query.max_new_tokens = _count(
        defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
    )
    total = len(query.prompt) + query.max_new_tokens
    if total > limits.capacity:
        raise ValueError(
            "Relay.submit: prompt + max_new_tokens must be at most the capacity "
            f"{limits.capacity}, "
            f"got {len(query.prompt)} + {query.max_new_tokens} = {total}"
        )
    needed = query.max_cached * limits.bytes_per_token
    if limits.kv_budget is not None and needed > limits.kv_budget:
        raise ValueError(
            "Relay.submit: prompt + max_new_tokens must fit the KV budget of "
            f"{limits.kv_budget} bytes, "
            f"got {len(query.prompt)} + {query.max_new_tokens} with up to {needed} bytes"
        )
    query.priority = _priority(priority)
    check_callback("on_token", on_token)
    check_callback("on_text", on_text)
    eos = defaults.eos if isinstance(eos, str) and eos == MODEL_EOS else eos
    stop = defaults.stop if stop is None else stop
    stopper = make_stopper(eos, stop, query.tokenizer)
    listener = None
    if on_text is not None:
        if query.tokenizer is None:
            raise ValueError("Relay.submit: on_text must be None when the relay has no tokenizer")
        listener = TextListener(on_text, TextPieces(stopper))
    options = make_options(limits.vocab_size, defaults.fill(sampling, len(query.prompt)))
    sampler = Sampler(options, query.id, query.prompt, stopper.eos)
    query.logprobs = None if options.logprobs is None else []
    query.serve(Serving(sampler, stopper, on_token, listener))


def _prompt(token_ids, vocab_size: int) -> list[int]:
    if isinstance(token_ids, str):
        raise TypeError(
            "Relay.submit: token_ids must be integers, got text "
            f"{token_ids[:40]!r}; tokenize it first"
        )
    try:
        # Tensors and arrays are converted to Python numbers at once, not one by one, for speed.
        items = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        prompt = [operator.index(token) for token in items]
    except TypeError:
        raise TypeError(
            f"Relay.submit: token_ids must be a sequence of integers, got {_shorten(token_ids)}"
        ) from None
    if not prompt:
        raise ValueError(
            "Relay.submit: token_ids must hold at least one token, got an empty prompt"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        index = next(i for i, token in enumerate(prompt) if not 0 <= token < vocab_size)
        raise ValueError(
            f"Relay.submit: token_ids must be in the vocabulary [0, {vocab_size}), "
            f"got {prompt[index]} at index {index}"
        )
    return prompt


def _count(max_new_tokens: int) -> int:
    try:
        count = operator.index(max_new_tokens)
    except TypeError:
        raise TypeError(
            f"Relay.submit: max_new_tokens must be an integer, got {max_new_tokens!r}"
        ) from None
    if count < 1:
        raise ValueError(f"Relay.submit: max_new_tokens must be >= 1, got {count}")
    return count


def _priority(priority: float) -> float:
    try:
        number = float(priority)
    except (TypeError, ValueError):
        raise TypeError(
            f"Relay.submit: priority must be a number, got {_shorten(priority)}"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"Relay.submit: priority must be finite, got {priority}")
    return number


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
