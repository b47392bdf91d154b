"""The interface between a relay and a model, whichever code computes the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import torch

from baton_kernels import KVCache
from baton_kernels.ops.checks import EIGHT_BITS

from .packed_batch import PackedBatch

_Self = TypeVar("_Self", bound="ModelHandle")


class ModelHandle(ABC):
    """A model in use for packed forwards, until `undo`; `with handle:` undoes at the end.

    Attributes:
        model: the model; for a stand-in, any object with a `config`.
        num_layers, num_kv_heads, head_dim, vocab_size: int, its sizes as its cache sees them.
        dtype, device: of its keys and values.
        whole_prompts: bool; whether prompts must be computed whole.
        num_ranks: int; processes that share every layer (tensor parallelism).
        can_be_captured: bool; whether `forward` with one token per row may be captured in a CUDA
            graph: on a GPU it never waits, it skips rows in slot -1, and the bits of a row do not
            depend on the number of rows. `addresses` then returns what a capture depends on.
        takes_eight_bits: bool; whether a cache may be of int8 or float8_e4m3fn.
    """

    model: Any
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    whole_prompts: bool = False
    num_ranks: int = 1
    can_be_captured: bool = False
    takes_eight_bits: bool = False

    def new_cache(
        self,
        num_slots: int,
        capacity: int,
        *,
        aligned: bool = False,
        dtype: torch.dtype | None = None,
        huge_pages: bool = False,
    ) -> KVCache:
        """A cache that fits the model.

        Args:
            num_slots: int, at least 1; queries it can hold.
            capacity: int, at least 1; columns of a slot.
            aligned: bool; whether all rows end in the same column.
            dtype: of keys and values; None or the model's own; on a CPU also int8 or float8_e4m3fn
                if the handle supports them.
            huge_pages: bool; see `KVCache`.

        Raises:
            ValueError: num_slots or capacity is below 1.
            NotImplementedError: dtype is anything else.
        """
        eight_bits = tuple(EIGHT_BITS) if self.takes_eight_bits else ()
        if dtype not in (None, self.dtype, *eight_bits):
            others = "".join(f" or {other}" for other in eight_bits)
            raise NotImplementedError(
                f"{type(self).__name__}.new_cache: dtype must be the model's ({self.dtype}){others}"
                f", got {dtype}"
            )
        return KVCache(
            self.num_layers,
            num_slots,
            self.num_kv_heads,
            capacity,
            self.head_dim,
            dtype=self.dtype if dtype is None else dtype,
            device=self.device,
            aligned=aligned,
            huge_pages=huge_pages,
        )

    @overload
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: KVCache,
        *,
        logits: Literal["last", "all"] = ...,
        float32: bool = ...,
    ) -> torch.Tensor: ...
    @overload
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: KVCache,
        *,
        logits: str,
        float32: bool = ...,
    ) -> torch.Tensor | None: ...
    @abstractmethod
    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: KVCache,
        *,
        logits: str = "last",
        float32: bool = True,
    ) -> torch.Tensor | None:
        """Compute the packed tokens: write their keys and values, return logits.

        Args:
            token_ids: int32 or int64 `[total_tokens]`.
            batch: PackedBatch of the cache's shape, whose rows already count these tokens.
            cache: KVCache of `new_cache`. Written: the columns of the packed tokens.
            logits: "last" for the logits of each row's last token, "all" for those of every packed
                token, "none" for none.
            float32: bool; whether logits are converted to float32, or may stay in the dtype in
                which they were computed, with the same values.

        Returns:
            `[rows, vocab_size]` or `[total_tokens, vocab_size]`; or None.
        """

    def addresses(self, longest: int) -> tuple[int, ...]:
        """The addresses that a forward reads besides its arguments and the cache. As long as they
        stay the same, a captured forward may be replayed.

        Args:
            longest: tokens of the longest row; anything it needs is computed now.

        Raises:
            RuntimeError, NotImplementedError: as `forward` if the model was changed.
        """
        raise NotImplementedError(f"{type(self).__name__}.addresses: forward cannot be captured")

    @abstractmethod
    def twin(self) -> ModelHandle:
        """A handle on the same model whose `forward` another thread may call at the same time; use
        it only until `undo`."""

    @abstractmethod
    def undo(self) -> None:
        """Restore the model. Undoing twice does nothing."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()
