"""Chooses the handle through which a relay computes a model."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from baton_engines.llama import ModelHandle, patch_llama

from .any_model import AnyModel

_log = logging.getLogger(__name__)


def adapt(model: PreTrainedModel, *, weight_dtype: str | torch.dtype | None = None) -> ModelHandle:
    """The fastest handle that computes the model exactly; it stays in use until its `undo`.

    `patch_llama` where it supports the model, else `AnyModel`, which runs the model's own code and
    so supports other architectures, adapters, quantized layers and hooks.

    Args:
        model: a causal language model of transformers.
        weight_dtype: see `patch_llama`; `AnyModel` does not support it.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: model is patched already, or weight_dtype is not a supported dtype.
        NotImplementedError: neither supports the model; the message says what `AnyModel` lacks.
    """
    try:
        return patch_llama(model, weight_dtype=weight_dtype)
    except (NotImplementedError, TypeError) as refused:
        # Only the patch supports weights in another dtype.
        if weight_dtype is not None:
            raise
        handle = AnyModel(model)
        _log.info("%s runs through its own code: %s", type(model).__name__, refused)
        return handle
