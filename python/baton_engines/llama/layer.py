"""The arguments with which the packed pass calls the ops of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, overload

import torch

from .structure import DecoderLayer, Norm
from .weights import LayerWeights, Projection


class Layer(NamedTuple):
    """The arguments of a layer's norms (weight, eps) and projections (weight, bias), the number
    of tokens that a token sees, norms of each head's query and key, and whether to rotate these."""

    attention_norm: tuple[torch.Tensor, float]
    qkv: Projection
    output: Projection
    mlp_norm: tuple[torch.Tensor, float]
    gate_up: Projection
    down: Projection
    window: int | None
    query_norm: tuple[torch.Tensor, float] | None
    key_norm: tuple[torch.Tensor, float] | None
    rotates: bool

    @staticmethod
    def of(layer: DecoderLayer, weights: LayerWeights, window: int | None) -> Layer:
        """The arguments for a module and the weights of its projections.

        Args:
            layer: the module.
            weights: of its projections.
            window: how many tokens a token sees; None for all.
        """
        attention = layer.self_attn
        return Layer(
            attention_norm=norm_of(layer.input_layernorm),
            qkv=weights.qkv,
            output=weights.output,
            mlp_norm=norm_of(layer.post_attention_layernorm),
            gate_up=weights.gate_up,
            down=weights.down,
            window=window,
            query_norm=norm_of(getattr(attention, "q_norm", None)),
            key_norm=norm_of(getattr(attention, "k_norm", None)),
            rotates=bool(getattr(attention, "use_rope", True)),
        )


@overload
def norm_of(module: Norm) -> tuple[torch.Tensor, float]: ...
@overload
def norm_of(module: Norm | None) -> tuple[torch.Tensor, float] | None: ...
def norm_of(module: Norm | None) -> tuple[torch.Tensor, float] | None:
    """The arguments of a norm; None where there is none."""
    return None if module is None else (module.weight, module.variance_epsilon)


def tensors_of(part: object) -> Iterator[torch.Tensor]:
    """The tensors of a layer, or of a part of one."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from tensors_of(inner)
