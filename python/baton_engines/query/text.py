"""Text of a growing list of tokens, decoded from a short window instead of the beginning."""

from __future__ import annotations

# Replacement characters at the end are held back, because the next token may complete the character
# that they stand for. Tokenizers with byte fallback show an incomplete character as one replacement
# per byte. More than this many are not an unfinished character but noise, which must not be decoded
# over and over again.
_MAX_UNFINISHED = 16


def decode_text(tokenizer, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
    """The text of `tokens`. A tokenizer is called in this way only."""
    # Cleaning up spaces would let a later token change earlier text, and text that was cut at a
    # stop string could then be wrong.
    return tokenizer.decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def unfinished(text: str) -> int:
    """How many characters at the end of decoded text may be the beginning of another character."""
    count = len(text) - len(text.rstrip("\ufffd"))
    return 0 if count > _MAX_UNFINISHED else count


class TextDecoder:
    """Decodes token by token.

    `text` never holds an unfinished character: its bytes are held back until the next tokens
    complete it. Any tokenizer with `decode` works; the streaming decoder of the library
    `tokenizers` needs a fast tokenizer and holds noise back forever.

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
            # The last tokens that were output stay as context: tokenizers drop or add a space at
            # the first token they see.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = len(self._decode())
        self.text += new
        return new

    def _decode(self) -> str:
        return decode_text(self._tokenizer, self._window, skip_special_tokens=self._skip)
