"""`BATON_VLLM`, an environment variable for what vLLM has no option for."""

from __future__ import annotations

import os

_WORDS = ("override", "invariant")


def overrides() -> bool:
    """Whether our attention takes the place of vLLM's own on the CPU.

    Raises:
        ValueError: `BATON_VLLM` has another word in it.
    """
    return "override" in _words()


def invariant() -> bool:
    """Whether an engine with our attention has our layers too.

    Raises:
        ValueError: `BATON_VLLM` has another word in it.
    """
    return "invariant" in _words()


def _words() -> set[str]:
    text = os.environ.get("BATON_VLLM", "")
    words = {word.strip() for word in text.split(",") if word.strip()}
    if not words.issubset(_WORDS):
        raise ValueError(f"BATON_VLLM: must be of {', '.join(_WORDS)}, got {text!r}")
    return words
