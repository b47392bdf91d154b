"""Who owns a patch: users that share one, and how it is undone when its owner is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import LlamaForCausalLM

from .forward import PatchedForward, PatchedLlama, patch_llama


def unpatch(model: LlamaForCausalLM) -> None:
    """Undo whatever patch lies over the model, whoever made it; its handle can no longer compute.

    For a notebook whose handle is lost. A model that is not patched stays as it is.

    Args:
        model: LlamaForCausalLM. Written: see `PatchedLlama.undo`.
    """
    forward = model.__dict__.get("forward")
    if isinstance(forward, PatchedForward) and forward.handle is not None:
        forward.handle.undo()


@contextlib.contextmanager
def shared_patch(model: LlamaForCausalLM) -> Iterator[PatchedLlama]:
    """The handle of a model for as long as the block runs; several blocks share one patch.

    The last of them undoes it. A patch that the user made with `patch_llama` is used as it is and
    stays.

    Args:
        model: LlamaForCausalLM. Written: see `patch_llama`.

    Raises:
        Exception: what `patch_llama` raises.
    """
    forward = getattr(model, "__dict__", {}).get("forward")
    handle = forward.handle if isinstance(forward, PatchedForward) else None
    if handle is None:
        handle = patch_llama(model)
        handle.num_sharing = 0
    shared = handle.num_sharing is not None
    if shared:
        handle.num_sharing += 1
    try:
        yield handle
    finally:
        if shared:
            handle.num_sharing -= 1
            if handle.num_sharing == 0:
                handle.undo()
