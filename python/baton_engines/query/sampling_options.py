"""The checked options of `Relay.submit` that say how one query's tokens are chosen."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Below this temperature a softmax is the arg max as far as float32 can tell, and dividing by it
# would overflow.
_GREEDY_TEMPERATURE = 1e-6
# Far beyond any reasonable value, and small enough that no sum with a logit overflows.
_LARGEST = 1e6
_MAX_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingOptions:
    """Rules on logits and how a token is drawn. The defaults change nothing and take the arg max.

    Rules apply in this order: logit_bias, repetition_penalty, frequency and presence penalty, and
    excluded tokens; then temperature, top_k, top_p and min_p.

    Attributes:
        temperature: 0 is greedy (as is anything under 1e-6).
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: in (0, 1]; keep the fewest likeliest tokens that sum to it.
        min_p: in [0, 1]; keep tokens at least this times as likely as the likeliest.
        repetition_penalty: > 0; logits of tokens in prompt and answer are divided by it, or
            multiplied where negative, as in Hugging Face.
        frequency_penalty: subtracted from a logit for each time the answer has the token.
        presence_penalty: subtracted from a logit if the answer has the token.
        logit_bias: pairs of a token id and the number added to its logit.
        suppress_tokens: ids that are never chosen.
        begin_suppress_tokens: ids that are not chosen as the first token.
        min_new_tokens: end-of-sequence ids are not chosen before this many tokens.
        logprobs: how many of the likeliest tokens are recorded with every token; None records
            nothing, 0 the token's own probability only.
        seed: of the query's own random numbers; None means the query's id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the token is the arg max."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def restricts(self) -> bool:
        """Whether options exclude tokens because others are likelier."""
        return bool(self.top_k or self.top_p < 1 or self.min_p > 0)


def make_options(vocab_size: int, given: Mapping[str, object]) -> SamplingOptions:
    """Checks options.

    Args:
        vocab_size: token ids are below it.
        given: values by the names of `SamplingOptions`; missing ones keep their defaults.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """
    unknown = given.keys() - _CHECKS.keys()
    if unknown:
        raise TypeError(f"Relay.submit: options must be known ones, got {sorted(unknown)}")
    options = SamplingOptions(
        **{name: _CHECKS[name](name, value, vocab_size) for name, value in given.items()}
    )
    banned = {*options.suppress_tokens, *options.begin_suppress_tokens}
    if len(banned) >= vocab_size:
        raise ValueError(
            "Relay.submit: suppress_tokens must leave a token to choose, got all of them"
        )
    return options


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"Relay.submit: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"Relay.submit: {name} must be a number, got {value!r}") from None


def _between(low: float, high: float, text: str, *, open_low: bool = False):
    """A check of a number's range; `text` describes the range. NaN is in no range."""

    def check(name: str, value: object, _: int) -> float:
        number = _number(name, value)
        if not (low < number if open_low else low <= number) or not number <= high:
            raise ValueError(f"Relay.submit: {name} must be {text}, got {value}")
        return number

    return check


def _whole(low: int, high: float, text: str):
    def check(name: str, value: object, _: int) -> int:
        number = _integer(name, value)
        if not low <= number <= high:
            raise ValueError(f"Relay.submit: {name} must be {text}, got {value}")
        return number

    return check


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"Relay.submit: {name} must be an integer, got {value!r}") from None


def _ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"Relay.submit: {name} must be a sequence of token ids, got {value!r}")
    ids = tuple(_integer(name, item) for item in value)
    for id in ids:
        _in_vocabulary(name, id, vocab_size)
    return ids


def _bias(name: str, value: object, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"Relay.submit: {name} must be a mapping of token ids to numbers, got {value!r}"
        )
    pairs = {}
    for key, bias in value.items():
        # JSON has only strings as keys.
        id = int(key) if isinstance(key, str) and key.isdecimal() else _integer(name, key)
        _in_vocabulary(name, id, vocab_size)
        number = _number(name, bias)
        if not abs(number) <= _LARGEST:
            raise ValueError(f"Relay.submit: {name} must be within {_LARGEST:.0e}, got {bias}")
        pairs[id] = number
    return tuple(pairs.items())


def _in_vocabulary(name: str, id: int, vocab_size: int) -> None:
    if not 0 <= id < vocab_size:
        raise ValueError(
            f"Relay.submit: {name} must be in the vocabulary [0, {vocab_size}), got {id}"
        )


def _temperature(name: str, value: object, _: int) -> float:
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"Relay.submit: {name} must be finite and >= 0, got {value}")
    return number


_penalty = _between(-_LARGEST, _LARGEST, f"within {_LARGEST:.0e}")
_CHECKS = {
    "temperature": _temperature,
    "top_k": _whole(0, math.inf, ">= 0"),
    "top_p": _between(0, 1, "in (0, 1]", open_low=True),
    "min_p": _between(0, 1, "in [0, 1]"),
    "repetition_penalty": _between(1 / _LARGEST, _LARGEST, f"from {1 / _LARGEST} to {_LARGEST}"),
    "frequency_penalty": _penalty,
    "presence_penalty": _penalty,
    "logit_bias": _bias,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "min_new_tokens": _whole(0, math.inf, ">= 0"),
    "logprobs": _whole(0, _MAX_LOGPROBS, f"from 0 to {_MAX_LOGPROBS}"),
    "seed": _whole(0, 2**64 - 1, "in [0, 2**64)"),
}
