"""The modules of a Llama as types: what `check_model` checks and the packed pass reads.

`nn.Module` finds its children at run time, so a type checker only sees "a tensor or a module".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn


class Norm(Protocol):
    """RMSNorm."""

    weight: torch.Tensor
    variance_epsilon: float


class Attention(Protocol):
    """Self-attention; only some families have `q_norm`, `k_norm` and `use_rope`."""

    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class MLP(Protocol):
    """The gated feed-forward part of a layer."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class DecoderLayer(Protocol):
    """A layer."""

    self_attn: Attention
    mlp: MLP
    input_layernorm: Norm
    post_attention_layernorm: Norm


class Rotary(Protocol):
    """The rotary module, with the state that it keeps between calls under dynamic RoPE."""

    rope_type: str
    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor
    original_max_seq_len: int
    max_seq_len_cached: int

    def __call__(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions."""


class Body(Protocol):
    """The model without its head."""

    embed_tokens: nn.Embedding
    layers: Sequence[DecoderLayer]
    norm: Norm
    rotary_emb: Rotary


class CausalLM(Protocol):
    """The model. Its config's fields differ between families."""

    config: Any
    model: Body
    lm_head: nn.Linear


def structure_of(model: nn.Module) -> CausalLM:
    """The model as the type that `check_model` checks, before or after the check."""
    return cast(CausalLM, model)
