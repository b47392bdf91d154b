"""The weights of the patched pass: packed on the CPU, merged on other devices."""

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
        model: a model that `patch_llama` has checked. Written: its parameters, see there.
        num_layers: how many of its layers are used.
        dtype: of the packed weights on the CPU; None for the model's own.
        keep_parameters: see `patch_llama`.

    Attributes:
        layers: the weights of each layer, until `restore`.
        head: the projection to logits.
        has_parameters: bool; whether the model's parameters hold their values meanwhile.
        is_exact: bool; if they do not, whether `restore` brings the values back.
    """

    def __init__(
        self,
        model: CausalLM,
        num_layers: int,
        *,
        dtype: torch.dtype | None = None,
        keep_parameters: bool,
    ) -> None:
        head, self._embedding = model.lm_head, model.model.embed_tokens
        packs = head.weight.device.type == "cpu"
        self._dtype = dtype
        self.is_exact = dtype in (None, head.weight.dtype)
        layers = [_linears(layer) for layer in model.model.layers[:num_layers]]
        self.has_parameters = keep_parameters or not packs
        self._memory = None
        if packs:
            every = [*(group for layer in layers for group in layer), (head,)]
            self._memory = memory_for(every, dtype)
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
        """The embedding's rows for tokens; those of a tied embedding are unpacked.

        Args:
            token_ids: int32 or int64 `[tokens]`.
        """
        if self._looked_up is not None:
            return self._looked_up.rows(token_ids).to(self._embedding.weight.dtype)
        return nn.functional.embedding(token_ids, self._embedding.weight)

    @property
    def embedding(self) -> torch.Tensor:
        """The tensor in which `embed` looks rows up."""
        return self._embedding.weight if self._looked_up is None else self._looked_up.panels

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that projections read, including the head's, and of their scales."""
        projections = [projection for layer in self.layers for projection in layer]
        total = 0
        for weight, _ in (*projections, self.head):
            if isinstance(weight, kernels.PackedWeight):
                total += weight.panels.nbytes
                total += 0 if weight.scales is None else weight.scales.nbytes
            else:
                total += weight.nbytes
        return total

    def is_shared(self) -> bool:
        """Whether the model's parameters are still as the patch left them."""
        return self._taken[0].is_shared()

    def restore(self) -> None:
        """Give each parameter separate memory, in reverse order of packing."""
        # Drops the last references to a weight before the next one is restored.
        self.layers.clear()
        self._looked_up = None
        self.__dict__.pop("head", None)
        while self._taken:
            self._taken.pop().restore()
            self._trim()

    def _take(self, linears: Sequence[nn.Linear], also: Sequence[nn.Module] = ()) -> Projection:
        """Linear modules with the same input as one projection."""
        taken: MergedProjection | PackedProjection
        if self._memory is not None:
            taken = PackedProjection(
                linears,
                self._memory,
                dtype=self._dtype,
                keep_parameters=self.has_parameters,
                also=also,
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


def checked_weight_dtype(where: str, value: object, device: torch.device) -> torch.dtype | None:
    """The dtype of packed weights from a user's argument.

    Args:
        where: what errors begin with.
        value: None, "int8" or torch.int8.
        device: of the model.

    Raises:
        ValueError: value is something else.
        NotImplementedError: int8 on another device than the CPU.
    """
    if value is None:
        return None
    if value not in ("int8", torch.int8):
        raise ValueError(f"{where}: weight_dtype must be None or 'int8', got {value!r}")
    if device.type != "cpu":
        raise NotImplementedError(
            f"{where}: weight_dtype must be None for a model that is not on the cpu, got 'int8' "
            f"and a model on {device}"
        )
    return torch.int8


def _linears(layer: DecoderLayer) -> tuple[tuple[nn.Linear, ...], ...]:
    """A layer's linear modules in the order of `LayerWeights`, grouped by input."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
