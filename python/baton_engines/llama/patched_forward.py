"""What a patched model's `forward` is: the packed pass for packed calls, else what it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

import baton_kernels as kernels

from .handle import ModelHandle
from .packed_batch import PackedBatch


class PatchedForward:
    """`model.forward` while patched: packed when `batch` is given, else what it was.

    An object instead of a closure, so that a copy of a patched model, which is not patched, calls
    the copy. Its signature is the original's, because `generate` looks at that.

    Args:
        handle: computes packed calls; set `handle` to None when the patch is undone.
        original: the former `model.forward`.
        refusal: says why an unpatched call cannot be computed; None if it can.
    """

    def __init__(
        self,
        handle: ModelHandle,
        original: Callable[..., Any],
        refusal: Callable[[], str | None],
    ) -> None:
        self.handle: ModelHandle | None = handle
        self.original = original
        self._refusal = refusal
        functools.update_wrapper(self, original)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has no owner who could undo its patch, so it becomes
        unpatched."""
        return _as_it_was, (self.original,)

    def __call__(
        self,
        *args: Any,
        batch: PackedBatch | None = None,
        cache: Any = None,
        logits: str = "last",
        **kwargs: Any,
    ) -> Any:
        if batch is None and not isinstance(cache, kernels.KVCache):
            refusal = None if self.handle is None else self._refusal()
            if refusal is not None:
                raise RuntimeError(refusal)
            # From transformers 5.24 on, a model's own cache argument has this name too.
            return self.original(*args, **({} if cache is None else {"cache": cache}), **kwargs)
        token_ids = args[0] if args else kwargs.pop("input_ids", None)
        if batch is None or cache is None or token_ids is None or kwargs or len(args) > 1:
            raise ValueError(
                "model.forward: a packed call must be (input_ids, batch=..., cache=..., "
                f"logits=...), got {len(args)} positional arguments, batch {type(batch).__name__}, "
                f"cache {type(cache).__name__} and other arguments {sorted(kwargs)}"
            )
        if self.handle is None:
            raise RuntimeError("model.forward: the patch was undone; call patch_llama again")
        computed = self.handle.forward(token_ids.reshape(-1), batch, cache, logits=logits)
        return CausalLMOutputWithPast(logits=computed)


def _as_it_was(original: Callable[..., Any]) -> Callable[..., Any]:
    return original
