"""Text of a growing list of tokens, decoded from a short window instead of the beginning."""

from __future__ import annotations

from .query import decode_text, unfinished


class TextDecoder:
    """Decodes token by token.

    `text` never holds an unfinished character: its bytes are kept back until the next tokens
    complete it. Any tokenizer with `decode` will do; the streaming decoder of the library
    `tokenizers` needs a fast one, and holds noise back without an end.

    Args:
        tokenizer: of Hugging Face.
        skip_special_tokens: whether special tokens are left out.

    Attributes:
        text: all final text so far.
    """

    def __init__(self, tokenizer, *, skip_special_tokens: bool = True):
        self.text = ""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Add one token and return the text that became final with it."""
        self._window.append(token)
        decoded = self._decode()
        held = unfinished(decoded)
        final = len(decoded) - held
        new = decoded[self._shown : final]
        self._shown = max(self._shown, final)
        if new and not held:
            # The last shown tokens stay as context: tokenizers drop or add a space at the first
            # token they see.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = len(self._decode())
        self.text += new
        return new

    def _decode(self) -> str:
        return decode_text(self._tokenizer, self._window, skip_special_tokens=self._skip)
