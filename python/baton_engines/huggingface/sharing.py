"""Relays that share one handle of a model, and what is undone when the last of them is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..llama import ModelHandle
from ..llama.forward import PatchedLlama
from ..llama.patched_forward import PatchedForward
from .adapt import adapt


@dataclass
class _Shared:
    """A handle that only `shared_handle` may undo, and the number of blocks that use it."""

    handle: ModelHandle
    num_users: int = 0


_shared: WeakKeyDictionary[PreTrainedModel, _Shared] = WeakKeyDictionary()


@contextlib.contextmanager
def shared_handle(
    model: PreTrainedModel, *, weight_dtype: str | torch.dtype | None = None
) -> Iterator[ModelHandle]:
    """A handle of the model for the duration of the block; several blocks share one.

    The last block undoes it. A patch that the user made with `patch_llama` is used as it is, and
    stays.

    Args:
        model: see `adapt`.
        weight_dtype: see `adapt`; None accepts a handle with any.

    Raises:
        ValueError: the model is in use with weights of another dtype.
        Exception: what `adapt` raises.
    """
    patched = _patch_of(model)
    if patched is not None and weight_dtype is not None and patched.weight_dtype is None:
        raise ValueError(
            f"Relay: weight_dtype must be None for a model that is patched already, got "
            f"{weight_dtype!r}; give it to patch_llama"
        )
    shared = _shared.get(model) if isinstance(model, PreTrainedModel) else None
    if shared is None or (patched is not None and patched is not shared.handle):
        if patched is not None:
            yield patched
            return
        shared = _shared[model] = _Shared(adapt(model, weight_dtype=weight_dtype))
    shared.num_users += 1
    try:
        yield shared.handle
    finally:
        shared.num_users -= 1
        if shared.num_users == 0:
            shared.handle.undo()
            if _shared.get(model) is shared:
                del _shared[model]


def unpatch(model: PreTrainedModel) -> None:
    """Undo every patch of the model, even one in use, whose handles can then no longer compute.

    Meant for a notebook that has lost a handle. A model without a patch stays as it is.

    Args:
        model: a model of transformers. Written: see `PatchedLlama.undo` and `AnyModel.undo`.
    """
    for handle in (_patch_of(model), getattr(_shared.pop(model, None), "handle", None)):
        if handle is not None:
            handle.undo()


def _patch_of(model: object) -> PatchedLlama | None:
    forward = getattr(model, "__dict__", {}).get("forward")
    handle = forward.handle if isinstance(forward, PatchedForward) else None
    return handle if isinstance(handle, PatchedLlama) else None
