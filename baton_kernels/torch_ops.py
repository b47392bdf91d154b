"""The type of `torch.ops.baton_kernels` for a type checker: the schemas as protocols.

`ops` is that namespace, for engines that call the ops without their Python functions. A call
without an overload is a call of `default`. tests/test_torch_ops.py checks that these protocols
equal the schemas of csrc/bindings/library.cpp.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from baton_kernels.torch_ops_scaled import (
    AppendKvScaled,
    AppendKvScaledQuery,
    ExtractKvScaled,
    ExtractKvScaledOut,
    InsertKvScaled,
    MoveKvScaled,
)

__all__ = ["TorchOps", "ops"]


class _AppendKv(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor | None,
        columns: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None: ...


class _AppendKvQuery(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor | None,
        columns: Tensor,
        query: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor: ...


class _AppendKvOverloads(_AppendKv, Protocol):
    default: _AppendKv
    query: _AppendKvQuery
    scaled: AppendKvScaled
    scaled_query: AppendKvScaledQuery


class _AttentionMask(Protocol):
    def __call__(
        self,
        starts: Tensor | None,
        lengths: Tensor,
        query_length: int,
        key_length: int,
        dtype: torch.dtype = torch.bool,
        window: int | None = None,
    ) -> Tensor: ...


class _AttentionMaskOverloads(_AttentionMask, Protocol):
    default: _AttentionMask


class _ExtractKv(Protocol):
    def __call__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        total_tokens: int,
    ) -> tuple[Tensor, Tensor]: ...


class _ExtractKvOut(Protocol):
    def __call__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        total_tokens: int,
        key: Tensor,
        value: Tensor,
    ) -> None: ...


class _ExtractKvOverloads(_ExtractKv, Protocol):
    default: _ExtractKv
    out: _ExtractKvOut
    scaled: ExtractKvScaled
    scaled_out: ExtractKvScaledOut


class _InsertKv(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        zero_padding: bool = False,
    ) -> None: ...


class _InsertKvOverloads(_InsertKv, Protocol):
    default: _InsertKv
    scaled: InsertKvScaled


class _Likeliest(Protocol):
    def __call__(self, logits: Tensor) -> Tensor: ...


class _LikeliestOverloads(_Likeliest, Protocol):
    default: _Likeliest


class _Linear(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


class _LinearOverloads(_Linear, Protocol):
    default: _Linear


class _LinearPacked(Protocol):
    def __call__(
        self, x: Tensor, panels: Tensor, out_features: int, bias: Tensor | None = None
    ) -> Tensor: ...


class _LinearPackedInt8(Protocol):
    def __call__(
        self,
        x: Tensor,
        panels: Tensor,
        scales: Tensor,
        out_features: int,
        bias: Tensor | None = None,
    ) -> Tensor: ...


class _LinearPackedOverloads(_LinearPacked, Protocol):
    default: _LinearPacked
    int8: _LinearPackedInt8


class _MaskedSoftmax(Protocol):
    def __call__(
        self,
        scores: Tensor,
        starts: Tensor | None,
        lengths: Tensor,
        scale: float = 1.0,
        window: int | None = None,
    ) -> Tensor: ...


class _MaskedSoftmaxOverloads(_MaskedSoftmax, Protocol):
    default: _MaskedSoftmax


class _MergeAttention(Protocol):
    def __call__(
        self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class _MergeAttentionOverloads(_MergeAttention, Protocol):
    default: _MergeAttention


class _MoveKv(Protocol):
    def __call__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        source_slots: Tensor | None,
        source_starts: Tensor | None,
        target_slots: Tensor | None,
        target_starts: Tensor | None,
        lengths: Tensor,
    ) -> None: ...


class _MoveKvOverloads(_MoveKv, Protocol):
    default: _MoveKv
    scaled: MoveKvScaled


class _PackLinear(Protocol):
    def __call__(self, weight: Tensor, panels: Tensor) -> None: ...


class _PackLinearOverloads(_PackLinear, Protocol):
    default: _PackLinear


class _QuantizeLinear(Protocol):
    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]: ...


class _QuantizeLinearOverloads(_QuantizeLinear, Protocol):
    default: _QuantizeLinear


class _RaggedAttention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        lengths: Tensor,
    ) -> Tensor: ...


class _RaggedAttentionOptions(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        lengths: Tensor,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        max_query_length: int | None = None,
        max_length: int | None = None,
        block_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> Tensor: ...


class _RaggedAttentionLse(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        lengths: Tensor,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        max_query_length: int | None = None,
        max_length: int | None = None,
        block_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class _RaggedAttentionOut(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        lengths: Tensor,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        max_query_length: int | None = None,
        max_length: int | None = None,
        block_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        *,
        out: Tensor,
    ) -> None: ...


class _RaggedAttentionLseOut(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor | None,
        slots: Tensor | None,
        starts: Tensor | None,
        lengths: Tensor,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        max_query_length: int | None = None,
        max_length: int | None = None,
        block_table: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        *,
        out: Tensor,
        lse: Tensor,
    ) -> None: ...


class _RaggedAttentionOverloads(_RaggedAttention, Protocol):
    default: _RaggedAttention
    options: _RaggedAttentionOptions
    lse: _RaggedAttentionLse
    out: _RaggedAttentionOut
    lse_out: _RaggedAttentionLseOut


class _RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class _RmsNormResidual(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class _RmsNormOverloads(_RmsNorm, Protocol):
    default: _RmsNorm
    residual: _RmsNormResidual


class _SiluAndMul(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


class _SiluAndMulOverloads(_SiluAndMul, Protocol):
    default: _SiluAndMul


class _UnpackLinear(Protocol):
    def __call__(
        self, panels: Tensor, out_features: int, in_features: int, outputs: Tensor | None = None
    ) -> Tensor: ...


class _UnpackLinearOverloads(_UnpackLinear, Protocol):
    default: _UnpackLinear


class TorchOps(Protocol):
    """The ops by name, each with its overloads."""

    append_kv: _AppendKvOverloads
    attention_mask: _AttentionMaskOverloads
    extract_kv: _ExtractKvOverloads
    insert_kv: _InsertKvOverloads
    likeliest: _LikeliestOverloads
    linear: _LinearOverloads
    # CPU only: the ops behind PackedWeight.
    linear_packed: _LinearPackedOverloads
    pack_linear: _PackLinearOverloads
    unpack_linear: _UnpackLinearOverloads
    quantize_linear: _QuantizeLinearOverloads
    masked_softmax: _MaskedSoftmaxOverloads
    merge_attention: _MergeAttentionOverloads
    move_kv: _MoveKvOverloads
    ragged_attention: _RaggedAttentionOverloads
    rms_norm: _RmsNormOverloads
    silu_and_mul: _SiluAndMulOverloads

    def use_torch_threads(self, use: bool) -> None: ...
    def set_cpu_isa(self, name: str, force: bool = False) -> None: ...
    def cpu_isas(self) -> str: ...
    def cuda_build(self) -> str: ...  # of the CUDA library


# torch's own namespace type knows no ops.
ops = cast(TorchOps, torch.ops.baton_kernels)
