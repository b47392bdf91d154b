"""Requests for OpenAI's completions and chat completions, and their conversion for `Relay.submit`.

Options that the interface lacks but vLLM's server has are accepted under vLLM's names: top_k,
min_p, repetition_penalty, ignore_eos.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..query.chat import ContentError, encode_messages
from .engine import BadRequestError

# OpenAI's own default for completions.
_COMPLETION_TOKENS = 16
# Unsupported fields that would change the answer; using one is an error.
_UNSUPPORTED = (
    "audio", "best_of", "echo", "function_call", "functions", "prediction", "suffix", "tools",
    "web_search_options",
)  # fmt: skip
# With these values such fields have no effect and are accepted.
_NOTHING: tuple[Any, ...] = (None, False, [], "", "none", 1)


class StreamOptions(BaseModel):
    """Options of a request that streams."""

    include_usage: bool = False


class Request(BaseModel):
    """The fields that both kinds of requests have."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> dict[str, Any]:
        """The options of `Relay.submit` that both kinds have.

        Raises:
            BadRequestError: the request uses something that is not supported.
        """
        extra = self.model_extra or {}
        for name in _UNSUPPORTED:
            if extra.get(name) not in _NOTHING:
                raise BadRequestError(f"request: {name} must be left out, got {extra[name]!r}")
        kind = (extra.get("response_format") or {}).get("type", "text")
        if kind != "text":
            raise BadRequestError(f"request: response_format must be of type text, got {kind!r}")
        names = (
            "stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
            "frequency_penalty", "presence_penalty", "logit_bias",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.ignore_eos:
            options["eos"] = None
        return options


class CompletionRequest(Request):
    """A request to /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=100)

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        """Token ids of every prompt.

        Raises:
            BadRequestError: there is no prompt.
        """
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            parts: list[Any] = [given]
        else:
            parts = list(given)
        if not parts:
            raise BadRequestError("request: prompt must not be empty, got an empty list")
        return [
            list(tokenizer(part)["input_ids"]) if isinstance(part, str) else list(part)
            for part in parts
        ]

    def options(self) -> dict[str, Any]:
        """The options of `Relay.submit`; see `Request.options`."""
        return {
            **super().options(),
            "max_new_tokens": self.max_tokens or _COMPLETION_TOKENS,
            "logprobs": self.logprobs,
        }


class ChatRequest(Request):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        """Token ids of the conversation, as the only prompt.

        Raises:
            BadRequestError: the conversation cannot be made into a prompt.
        """
        for index, message in enumerate(self.messages):
            if "role" not in message or "content" not in message:
                raise BadRequestError(f"request: messages[{index}] must have a role and a content")
        if not getattr(tokenizer, "chat_template", None):
            raise BadRequestError("request: model must have a chat template, got one without")
        try:
            return [encode_messages(tokenizer, self.messages)]
        except ContentError as error:
            raise BadRequestError(str(error)) from error
        # Templates raise all kinds of exceptions for conversations that they do not accept.
        except Exception as error:
            raise BadRequestError(
                f"request: messages must fit the chat template, got {error}"
            ) from error

    def options(self) -> dict[str, Any]:
        """The options of `Relay.submit`; see `Request.options`. Without a limit, all that fits."""
        return {
            **super().options(),
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
