"""The overloads of `baton_kernels.torch_ops` whose caches have eight bits and scales."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class AppendKvScaled(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor | None,
        columns: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_scale: Tensor,
        value_scale: Tensor,
    ) -> None: ...


class AppendKvScaledQuery(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor | None,
        columns: Tensor,
        query: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_scale: Tensor,
        value_scale: Tensor,
    ) -> Tensor: ...


class ExtractKvScaled(Protocol):
    def __call__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        total_tokens: int,
        key_scale: Tensor,
        value_scale: Tensor,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class ExtractKvScaledOut(Protocol):
    def __call__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        total_tokens: int,
        key_scale: Tensor,
        value_scale: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None: ...


class InsertKvScaled(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        zero_padding: bool,
        key_scale: Tensor,
        value_scale: Tensor,
    ) -> None: ...


class MoveKvScaled(Protocol):
    def __call__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        source_slots: Tensor | None,
        source_starts: Tensor | None,
        target_slots: Tensor | None,
        target_starts: Tensor | None,
        lengths: Tensor,
        key_scale: Tensor,
        value_scale: Tensor,
    ) -> None: ...
