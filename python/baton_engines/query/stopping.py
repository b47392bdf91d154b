"""Decides when a query ends before its length: end-of-sequence ids, sequences of ids, and strings.

Strings are searched in text that is decoded token by token, so a string is found across token
borders and in the middle of a token, and never within a character that is still incomplete.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .text import TextDecoder, decode_text


class StopText:
    """The text in which stop strings are searched, and how much of it the user sees.

    The two differ where a stop string contains a special token, which the user's text leaves out,
    and where the tokenizer drops the space before the first word, with which a stop string may
    begin.

    Args:
        tokenizer: of Hugging Face.
        strings: the stop strings.
    """

    def __init__(self, tokenizer, strings: tuple[str, ...]):
        special = getattr(tokenizer, "all_special_tokens", ())
        self._tokenizer = tokenizer
        self._strings = strings
        self._shown = TextDecoder(tokenizer)
        self._all = self._shown
        if any(token in string for string in strings for token in special):
            self._all = TextDecoder(tokenizer, skip_special_tokens=False)
        self._lost_space: str | None = None
        # The lengths of both texts after each token.
        self._lengths: list[tuple[int, int]] = [(0, 0)]

    @property
    def text(self) -> str:
        """The text that the user sees so far."""
        return self._shown.text

    @property
    def lengths(self) -> list[int]:
        """The length of the user's text before the first token and after each one."""
        return [shown for _, shown in self._lengths]

    def push(self, token: int) -> int | None:
        """Add a token. If it completes a stop string, return where the user's text ends, else
        None."""
        if self._lost_space is None:
            self._lost_space = _lost_space(self._tokenizer, token)
        new = self._all.push(token)
        if self._all is not self._shown:
            self._shown.push(token)
        self._lengths.append((len(self._all.text), len(self._shown.text)))
        if not new or not self._strings:
            return None
        text = self._lost_space + self._all.text
        # A match may begin in the text of earlier tokens, but it must end in the new text.
        begin = max(0, len(text) - len(new) - max(map(len, self._strings)) + 1)
        found = [index for string in self._strings if (index := text.find(string, begin)) >= 0]
        return self._shown_length(min(found)) if found else None

    def sure(self) -> int:
        """How much of the user's text cannot be withdrawn by an incomplete stop string."""
        text = (self._lost_space or "") + self._all.text
        longest = max(map(len, self._strings), default=0)
        for begin in range(max(0, len(text) - longest + 1), len(text)):
            if any(string.startswith(text[begin:]) for string in self._strings):
                return self._shown_length(begin)
        return len(self._shown.text)

    def _shown_length(self, index: int) -> int:
        """Converts an index into the searched text to one into the user's."""
        index = max(0, index - len(self._lost_space or ""))
        if self._all is self._shown:
            return index
        known, shown = max(pair for pair in self._lengths if pair[0] <= index)
        return min(shown + index - known, len(self._shown.text))


def _lost_space(tokenizer, token: int) -> str:
    """The space that decoders like those of SentencePiece drop before a first word."""
    alone, twice = (decode_text(tokenizer, [token] * count) for count in (1, 2))
    return " " if alone and twice == f"{alone} {alone}" else ""


@dataclass
class Stopper:
    """The stop conditions of one query.

    Attributes:
        eos: ids that end a query by themselves.
        sequences: sequences of ids that end a query; left out of `text`.
        strings: strings that end a query; the text is cut before the first of them.
        tokenizer: needed only for strings.
        text: the text before the stop, once a sequence or string matched and there is a tokenizer.
    """

    eos: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()
    strings: tuple[str, ...] = ()
    tokenizer: object = None
    text: str | None = None
    _stop_text: StopText | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.strings:
            self._stop_text = StopText(self.tokenizer, self.strings)

    def push(self, tokens: list[int]) -> str | None:
        """Check the newest of all `tokens` so far; returns "eos", "stop", or None to continue."""
        if tokens[-1] in self.eos:
            return "eos"
        if self._stop_text is not None:
            end = self._stop_text.push(tokens[-1])
            if end is not None:
                self.text = self._stop_text.text[:end]
                return "stop"
        for sequence in self.sequences:
            if tokens[-len(sequence) :] == list(sequence):
                if self.tokenizer is not None:
                    self.text = decode_text(self.tokenizer, tokens[: -len(sequence)])
                return "stop"
        return None

    def fresh(self) -> Stopper:
        """The same conditions in their initial state."""
        return replace(self, text=None, _stop_text=None)


class TextPieces:
    """The text of a query in pieces, each as soon as it is certain.

    A piece holds complete characters only, and nothing that an incomplete stop string or sequence
    could withdraw; all pieces together are `Query.text`.

    Args:
        stopper: the query's stop conditions, with a tokenizer. Only read.
    """

    def __init__(self, stopper: Stopper):
        self._sequences = stopper.sequences
        self._stop_text = StopText(stopper.tokenizer, stopper.strings)
        self._tokens: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """Add a token that did not end the query; returns the text that it made certain."""
        self._tokens.append(token)
        self._stop_text.push(token)
        sure = self._stop_text.sure()
        held = max((self._beginning(sequence) for sequence in self._sequences), default=0)
        sure = min(sure, self._stop_text.lengths[-1 - held])
        return self._give(self._stop_text.text, sure)

    def finish(self, text: str) -> str:
        """The rest of the whole text of a query that has ended."""
        return self._give(text, len(text))

    def _beginning(self, sequence: tuple[int, ...]) -> int:
        """How many of the newest tokens form the beginning of a sequence."""
        for count in range(min(len(sequence) - 1, len(self._tokens)), 0, -1):
            if tuple(self._tokens[-count:]) == sequence[:count]:
                return count
        return 0

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece


def make_stopper(eos: int | Iterable[int] | None, stop: object, tokenizer=None) -> Stopper:
    """The stop conditions from the arguments of `Relay.submit`.

    Args:
        eos: one id, several, or None for none.
        stop: a string or a token id, or an iterable of strings, sequences of ids and single ids.
        tokenizer: decodes the text; without one no string is allowed.

    Raises:
        ValueError: an empty string or sequence, a string without a tokenizer, or a negative id.
        TypeError: anything else.
    """
    if eos is None:
        eos = ()
    elif not isinstance(eos, Iterable):
        eos = (eos,)
    if stop is None:
        stop = ()
    elif isinstance(stop, str) or not isinstance(stop, Iterable):
        stop = (stop,)
    strings, sequences = [], []
    for item in stop:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError(
                    "Relay.submit: stop must be token ids when the relay has no "
                    f"tokenizer, got {item!r}"
                )
            strings.append(item)
        else:
            sequences.append(_ids("stop", item if isinstance(item, Iterable) else (item,)))
    if not all(strings) or not all(sequences):
        raise ValueError(
            "Relay.submit: stop must hold strings and sequences that are not "
            "empty, got an empty one"
        )
    return Stopper(frozenset(_ids("eos", eos)), tuple(sequences), tuple(strings), tokenizer)


def _ids(argument: str, items: Iterable) -> tuple[int, ...]:
    try:
        ids = tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(
            f"Relay.submit: {argument} must be made of token ids, got {items!r}"
        ) from None
    if any(id < 0 for id in ids):
        raise ValueError(
            f"Relay.submit: {argument} must be made of token ids >= 0, got {list(ids)}"
        )
    return ids
