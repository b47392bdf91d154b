"""Where the patched pass has its weights: packed on the CPU, merged elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

import baton_kernels as kernels

from .merged_projection import MergedProjection
from .packed_projection import PackedProjection, memory_for, return_free_memory
from .structure import CausalLM, DecoderLayer

Weight = torch.Tensor | kernels.PackedWeight
Projection = tuple[Weight, torch.Tensor | None]


class LayerWeights(NamedTuple):
    """Weight and bias of a layer's projections."""

    qkv: Projection
    output: Projection
    gate_up: Projection
    down: Projection


class ModelWeights:
    """The weights of a model's projections as the patched pass reads them, until `restore`.

    Args:
        model: a model that `patch_llama` has checked. Written: its parameters; see there.
        num_layers: how many of its layers are used.
        keep_parameters: as `patch_llama` takes it.

    Attributes:
        layers: of each layer, until `restore`.
        head: of the projection to logits.
        has_parameters: bool; whether the model's parameters hold their values meanwhile.
    """

    def __init__(self, model: CausalLM, num_layers: int, *, keep_parameters: bool) -> None:
        head, self._embedding = model.lm_head, model.model.embed_tokens
        packs = head.weight.device.type == "cpu"
        layers = [_linears(layer) for layer in model.model.layers[:num_layers]]
        self.has_parameters = keep_parameters or not packs
        self._memory = None
        if packs:
            self._memory = memory_for([*(group for layer in layers for group in layer), (head,)])
        self._taken: list[MergedProjection | PackedProjection] = []
        self.layers: list[LayerWeights] = []
        self._looked_up: kernels.PackedWeight | None = None
        try:
            for groups in layers:
                self.layers.append(LayerWeights(*map(self._take, groups)))
                self._trim()
            is_tied = self._embedding.weight is head.weight
            self.head = self._take((head,), [self._embedding] if is_tied else [])
            weight = self.head[0]
            if is_tied and not self.has_parameters and isinstance(weight, kernels.PackedWeight):
                self._looked_up = weight
        except BaseException:
            self.restore()
            raise

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The embedding's rows; a tied one's lie packed.

        Args:
            token_ids: int32 or int64 `[tokens]`.
        """
        if self._looked_up is not None:
            return self._looked_up.rows(token_ids)
        return nn.functional.embedding(token_ids, self._embedding.weight)

    def is_shared(self) -> bool:
        """Whether the model's parameters are still what the patch has made of them."""
        return self._taken[0].is_shared()

    def restore(self) -> None:
        """Give each parameter memory of its own; what was taken last, first."""
        # The last references to a weight go before the next one is restored.
        self.layers.clear()
        self._looked_up = None
        self.__dict__.pop("head", None)
        while self._taken:
            self._taken.pop().restore()
            self._trim()

    def _take(self, linears: Sequence[nn.Linear], also: Sequence[nn.Module] = ()) -> Projection:
        """Linear modules on the same input as one projection."""
        taken: MergedProjection | PackedProjection
        if self._memory is not None:
            taken = PackedProjection(
                linears, self._memory, keep_parameters=self.has_parameters, also=also
            )
        elif len(linears) == 1:
            return linears[0].weight, linears[0].bias
        else:
            taken = MergedProjection(linears)
        self._taken.append(taken)
        return taken.weight, taken.bias

    def _trim(self) -> None:
        if not self.has_parameters:
            return_free_memory()


def _linears(layer: DecoderLayer) -> tuple[tuple[nn.Linear, ...], ...]:
    """A layer's linear modules in the order of `LayerWeights`, those on the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
