"""Converts conversations as users send them into what a chat template for text accepts.

The content of a message may be a string or a list of parts, as in OpenAI's interface. Templates
print what they get, so a list would appear in the prompt in Python's notation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TEXT_TYPES = ("text", "input_text", "output_text")
_ROLES_OF_TOOLS = ("tool", "function", "ipython")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")


class ContentError(ValueError):
    """Messages contain something that a text template cannot take; the message says where."""


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each content as one string, text parts joined.

    Args:
        messages: objects with a role, and a content that is a string or a list of parts.

    Raises:
        ContentError: a part is not text, a content is neither, or a message is about tools.
    """
    return [
        {**message, "content": _text_of(message, f"messages[{index}]")}
        for index, message in enumerate(messages)
    ]


def encode_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, continued: bool | None = None
) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next words begin.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        messages: see `plain_messages`.
        continued: whether the answer continues the last message instead of opening a turn; None:
            only if that message is the assistant's.

    Raises:
        ContentError: see `plain_messages`.
        Exception: what the template or the tokenizer raises, e.g. for a last message that it cannot
            continue.
    """
    plain = plain_messages(messages)
    if continued is None:
        continued = plain[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        plain,
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )
    # The template has already added the special tokens.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends the assistant's turn, if there is one.

    A model that was trained with a template ends its answers with this token, whether or not its
    generation config says so.
    """
    marker = "answer"
    if not getattr(tokenizer, "chat_template", None):
        return None
    conversation = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": marker},
    ]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        before, found, rest = text.rpartition(marker)
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
        special = set(tokenizer.all_special_ids)
    # A template may reject any conversation; then it is unknown how it ends a turn.
    except Exception:
        return None
    return ids[0] if ids and ids[0] in special else None


def _text_of(message: Mapping[str, Any], where: str) -> str:
    if message["role"] in _ROLES_OF_TOOLS:
        raise ContentError(
            f"{where}.role must be system, user or assistant, got {message['role']!r}: "
            "tools are not supported"
        )
    for name in _TOOL_FIELDS:
        if message.get(name):
            raise ContentError(f"{where}.{name} must be left out, got one: tools are not supported")
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ContentError(
            f"{where}.content must be a string or a list of parts, got {type(content).__name__}"
        )
    return "".join(
        _text_of_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)
    )


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind not in _TEXT_TYPES:
        hint = ": images are not supported" if "image" in str(kind) else ""
        raise ContentError(f"{where} must be a part of type text, got {kind!r}{hint}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ContentError(f"{where}.text must be a string, got {type(text).__name__}")
    return text
