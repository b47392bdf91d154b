"""vLLM's layers on the ops, so that a token's bits do not depend on the batch.

vLLM's linear layers choose an order of summation by the number of tokens; its own switch,
`VLLM_BATCH_INVARIANT`, is for GPUs. These take the place of its layers through its registry of
out-of-tree layers, and only in an engine whose attention is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp, PluggableLayer, op_registry_oot
from vllm.model_executor.layers import activation, layernorm, linear, vocab_parallel_embedding
from vllm.platforms import current_platform

import baton_kernels
from baton_kernels import PackedWeight

from .switch import overrides

_LINEAR_LAYERS = (
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
    linear.RowParallelLinear,
)
_VOCABULARY_LAYERS = (
    vocab_parallel_embedding.VocabParallelEmbedding,
    vocab_parallel_embedding.ParallelLMHead,
)


def register_layers() -> None:
    """Registers all layers of this module, except where another plugin has been first."""
    if not current_platform.is_cpu():
        return
    layers = [_with_method(base, LinearMethod) for base in _LINEAR_LAYERS]
    layers += [_with_method(base, EmbeddingMethod) for base in _VOCABULARY_LAYERS]
    for layer in layers:
        if layer.__name__ not in op_registry_oot:
            PluggableLayer.register_oot(layer, name=layer.__name__)
    for operation in (RMSNorm, GemmaRMSNorm, SiluAndMul):
        if operation.__name__ not in op_registry_oot:
            CustomOp.register_oot(operation, name=operation.__name__)


def chosen() -> bool:
    """Whether the engine that is being built has our attention."""
    backend = get_current_vllm_config().attention_config.backend
    return overrides() if backend is None else backend.name == "CUSTOM"


def _project(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    y = baton_kernels.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.out_features)


class LinearMethod(linear.UnquantizedLinearMethod):
    """A projection by `linear`, whose weight is packed."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Packed weights take the place of the layer's, as vLLM's own do."""
        layer.packed = baton_kernels.pack_linear(layer.weight)
        layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        return _project(x, layer.packed, bias)


class EmbeddingMethod(vocab_parallel_embedding.UnquantizedEmbeddingMethod):
    """As `LinearMethod`, for the projection to the vocabulary; rows are looked up in the weight."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing is packed before it is used: most embeddings only look rows up."""
        layer.packed = None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        if layer.packed is None:
            layer.packed = baton_kernels.pack_linear(layer.weight)
        return _project(x, layer.packed, bias)


def _with_method(base: Any, method: Any) -> Any:
    """A subclass of vLLM's layer whose unquantized weights are used by our method."""
    theirs = method.__base__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, *args, **kwargs)
        if type(self.quant_method) is theirs and chosen():
            self.quant_method = method()

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": __name__})


class RMSNorm(layernorm.RMSNorm):
    """`rms_norm`, unless only a part of each row counts or there is no weight."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._chosen = chosen() and self.has_weight and self.variance_size_override is None

    def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The normalized rows; with residual also the sum."""
        if not self._chosen or self.weight.dtype != x.dtype:
            return super().forward_native(x, residual)
        return baton_kernels.rms_norm(x, self.weight, self.variance_epsilon, residual=residual)


class GemmaRMSNorm(layernorm.GemmaRMSNorm):
    """`rms_norm` in float32, with a weight of which vLLM stores the difference from 1."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._chosen = chosen()

    def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The normalized rows; with residual also the sum."""
        if not self._chosen:
            return super().forward_native(x, residual)
        weight = self.weight.float() + 1.0
        rows = x.float()
        if residual is None:
            return baton_kernels.rms_norm(rows, weight, self.variance_epsilon).to(x.dtype)
        y, total = baton_kernels.rms_norm(
            rows, weight, self.variance_epsilon, residual=residual.float()
        )
        return y.to(x.dtype), total.to(x.dtype)


class SiluAndMul(activation.SiluAndMul):
    """`silu_and_mul`: torch's elementwise functions differ between the middle and the end of what
    one thread computes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if chosen():
            self._forward_method = baton_kernels.silu_and_mul
