"""An attention backend of vLLM: its pages are written by `append_kv` and read by `ragged_attention`
through its block table. Nothing is gathered or copied.

vLLM stores a page of a KV head as `[page, 2 * head_dim]` numbers, whose order is the backend's own
affair: all keys, then all values, so that both are caches of pages as the ops take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

import baton_kernels

# The head dims of the ops.
_HEAD_SIZES = range(16, 257, 8)


@dataclass(frozen=True)
class Metadata(AttentionMetadata):
    """Arguments of the ops that all layers of a step share.

    Attributes:
        num_actual_tokens: tokens of the step, padding left out.
        pages: page that each token's key and value go to.
        columns: column of that page.
        cu_seqlens_q: where each request's tokens begin.
        starts: the column that each request begins in: zeros.
        lengths: tokens of each request, those of this step included.
        block_table: pages of each request.
        max_query_length: bound of the requests' tokens in this step.
        max_length: bound of lengths.
    """

    num_actual_tokens: int
    pages: torch.Tensor
    columns: torch.Tensor
    cu_seqlens_q: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    max_query_length: int
    max_length: int


class Builder(AttentionMetadataBuilder[Metadata]):
    """Makes `Metadata` from what vLLM knows about a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._page = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Metadata:
        """The step's metadata.

        Raises:
            NotImplementedError: attention is not causal.
        """
        step = common_attn_metadata
        if step.causal is not True:
            raise NotImplementedError(
                f"baton_engines.vllm: causal must be True, got {step.causal!r}"
            )
        rows = step.num_reqs
        places = step.slot_mapping[: step.num_actual_tokens]
        return Metadata(
            num_actual_tokens=step.num_actual_tokens,
            # A padded place of -1 is page -1, which the kernels of a GPU skip.
            pages=places.div(self._page, rounding_mode="floor").to(torch.int32),
            columns=places.remainder(self._page).to(torch.int32),
            cu_seqlens_q=step.query_start_loc[: rows + 1].to(torch.int32),
            # The ops would make them for each layer.
            starts=torch.zeros(rows, dtype=torch.int32, device=places.device),
            lengths=step.seq_lens[:rows].to(torch.int32),
            block_table=step.block_table_tensor[:rows].to(torch.int32),
            max_query_length=step.max_query_len,
            max_length=step.max_seq_len,
        )


class Impl(AttentionImpl[Metadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ):
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"baton_engines.vllm: attn_type must be decoder, got {attn_type}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes).float()
        self.sinks = sinks
        self._kv_cache: torch.Tensor | None = None
        self._pages: tuple[torch.Tensor, torch.Tensor] | None = None
        if current_platform.is_cpu():
            # vLLM's other operators run on torch's threads, which spin between two of them and may
            # be bound to one core each.
            baton_kernels.use_torch_threads()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the keys and values of the step's tokens, then attends.

        Args:
            layer: the layer.
            query: `[tokens, num_heads, head_size]`; more tokens than the step has are padding.
            key: `[tokens, num_kv_heads, head_size]`.
            value: as key.
            kv_cache: `[pages, num_kv_heads, page, 2 * head_size]`. Written.
            attn_metadata: of the step; None while vLLM measures its memory.
            output: as query. Written.
            output_scale: must be None, as must output_block_scale.

        Raises:
            NotImplementedError: a quantized output is wanted.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("baton_engines.vllm: output_scale must be None")
        if attn_metadata is None:
            return output
        step = attn_metadata
        tokens = step.num_actual_tokens
        keys, values = self._pages_of(kv_cache)
        # Another layer's cache is read here as that layer has written it.
        if self.kv_sharing_target_layer_name is None:
            baton_kernels.append_kv(
                key[:tokens], value[:tokens], keys, values, step.pages, step.columns
            )
        baton_kernels.ragged_attention(
            query[:tokens],
            keys,
            values,
            step.cu_seqlens_q,
            None,
            step.starts,
            step.lengths,
            scale=self.scale,
            window=self.sliding_window,
            softcap=self.logits_soft_cap,
            alibi_slopes=self._on(query.device, self.alibi_slopes),
            sinks=self._on(query.device, self.sinks),
            out=output[:tokens],
            max_query_length=step.max_query_length,
            max_length=step.max_length,
            block_table=step.block_table,
        )
        return output

    def _pages_of(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `[pages, num_kv_heads, page, head_size]`."""
        # It is the same tensor at every step, and views take as long as a small op.
        if kv_cache is not self._kv_cache or self._pages is None:
            pages, kv_heads, page, _ = kv_cache.shape
            both = kv_cache.view(pages, kv_heads, 2 * page, self.head_size)
            keys, values = both.chunk(2, dim=2)
            self._kv_cache, self._pages = kv_cache, (keys, values)
        return self._pages

    def _on(self, device: torch.device, numbers: torch.Tensor | None) -> torch.Tensor | None:
        # Sinks are a parameter, which is loaded after this object is made, in the model's dtype.
        return None if numbers is None else numbers.to(device, torch.float32)


class Backend(AttentionBackend):
    """The properties that vLLM reads from a backend before it uses it."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The name of an entry in vLLM's own table of backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The class that computes a layer."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The class that prepares a step."""
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages of any size."""
        return [MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Those of the ops."""
        return list(_HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers, then pages, then heads, so that a head's page is contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """`window` of the op."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """`sinks` of the op."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Called with `VLLM_BATCH_INVARIANT`, which replaces torch's functions by Triton kernels
        that a CPU cannot run. Use `BATON_VLLM=invariant` there; on a GPU the bits of a prompt can
        depend on its chunks."""
        return False


class Override(Backend):
    """`Backend` under the name of vLLM's own CPU backend, for what looks for that name."""

    @staticmethod
    def get_name() -> str:
        """See `Backend.get_name`."""
        return "CPU_ATTN"
