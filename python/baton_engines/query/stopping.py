"""When a query ends before its length: end-of-sequence ids, sequences of ids, and strings.

A string is looked for in text that is decoded token by token, so it is found across token borders
and in the middle of a token, and never inside a character that is still incomplete.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

from .query import decode_text

# Replacement characters at the end are held back, as the next token may complete what they stand
# for. Tokenizers with byte fallback show a character or two as one of them per byte; beyond that
# they are no unfinished text but noise, which must not be decoded over and over again.
_MAX_UNFINISHED = 16


class TextDecoder:
    """Text of a growing list of tokens, decoded from a short window instead of the beginning.

    `text` never holds an unfinished character: its bytes are kept back until the next tokens
    complete it.
    """

    def __init__(self, tokenizer):
        self.text = ""
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Add one token and return the text that became final with it."""
        self._window.append(token)
        decoded = decode_text(self._tokenizer, self._window)
        unfinished = len(decoded) - len(decoded.rstrip("\ufffd"))
        if unfinished > _MAX_UNFINISHED:
            unfinished = 0
        final = len(decoded) - unfinished
        new = decoded[self._shown : final]
        self._shown = max(self._shown, final)
        if new and not unfinished:
            # The last shown tokens stay as context: tokenizers drop or add a space at the first
            # token they see.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = len(decode_text(self._tokenizer, self._window))
        self.text += new
        return new


@dataclass
class Stopper:
    """The stop conditions of one query.

    Attributes:
        eos: ids that end a query by themselves.
        sequences: sequences of ids that end a query; left out of `text`.
        strings: strings that end a query; the text is cut before the first of them.
        tokenizer: needed for strings only.
        text: the text before the stop, once a sequence or string was met and there is a tokenizer.
    """

    eos: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()
    strings: tuple[str, ...] = ()
    tokenizer: object = None
    text: str | None = None
    _decoder: TextDecoder | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.strings:
            self._decoder = TextDecoder(self.tokenizer)

    def push(self, tokens: list[int]) -> str | None:
        """Look at the newest of all `tokens` generated so far; "eos", "stop" or None for go on."""
        if tokens[-1] in self.eos:
            return "eos"
        if self._decoder is not None and self._met_string(self._decoder.push(tokens[-1])):
            return "stop"
        for sequence in self.sequences:
            if tokens[-len(sequence) :] == list(sequence):
                if self.tokenizer is not None:
                    self.text = decode_text(self.tokenizer, tokens[: -len(sequence)])
                return "stop"
        return None

    def _met_string(self, new: str) -> bool:
        text = self._decoder.text
        # A match may begin in text of earlier tokens, but it has to end in the new text.
        begin = max(0, len(text) - len(new) - max(map(len, self.strings)) + 1)
        found = [index for string in self.strings if (index := text.find(string, begin)) >= 0]
        if found and new:
            self.text = text[: min(found)]
            return True
        return False


def make_stopper(eos: int | Iterable[int] | None, stop: object, tokenizer=None) -> Stopper:
    """The stop conditions from what `Relay.submit` was given.

    Args:
        eos: one id, several, or None for none.
        stop: a string or a token id, or an iterable of strings, sequences of ids and single ids.
        tokenizer: what decodes the text; without one no string can be given.

    Raises:
        ValueError: an empty string or sequence, a string without a tokenizer, a negative id.
        TypeError: something that is none of the above.
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
                    f"submit: stop must be token ids when the relay has no tokenizer, got {item!r}"
                )
            strings.append(item)
        else:
            sequences.append(_ids("stop", item if isinstance(item, Iterable) else (item,)))
    if not all(strings) or not all(sequences):
        raise ValueError(
            "submit: stop must hold strings and sequences that are not empty, got an empty one"
        )
    return Stopper(frozenset(_ids("eos", eos)), tuple(sequences), tuple(strings), tokenizer)


def _ids(argument: str, items: Iterable) -> tuple[int, ...]:
    try:
        ids = tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(f"submit: {argument} must be made of token ids, got {items!r}") from None
    if any(id < 0 for id in ids):
        raise ValueError(f"submit: {argument} must be made of token ids >= 0, got {list(ids)}")
    return ids
