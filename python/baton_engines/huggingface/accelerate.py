"""A transformers model's linear layers on packed weights, under the model's own code.

With `attn_implementation="baton"` and a slot cache, most of the time of a decode step on the CPU is
spent in `nn.Linear`. `accelerate` gives linear modules another forward, one by one, and changes
nothing else about a model: it works for any architecture, with `generate`, pipelines and compiled
steps. In Llama and its close relatives, norms and feed-forward modules are replaced as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import baton_kernels as kernels
from baton_engines.llama.check import SUPPORTED_ACTIVATIONS, SUPPORTED_DTYPES
from baton_engines.llama.family import Family, find_family
from baton_engines.llama.packed_projection import PackedProjection, memory_for, return_free_memory

# Bytes of weights that may exist twice before the C library is told to return freed memory.
_TRIM_BYTES = 64 << 20


def accelerate(model: PreTrainedModel) -> Accelerated:
    """Compute a model's linear layers from packed weights, until `undo`.

    `with accelerate(model): model.generate(...)` undoes at the end of the block. Each plain
    `nn.Linear` in a supported dtype computes by `baton_kernels.linear`, whose rows do not depend on
    each other; adapters, quantized layers and experts with separate parameters are not changed. In
    Granite, Llama, Mistral, Qwen2, Qwen3 and SmolLM3, RMSNorm is one op and the gated feed-forward
    part three. Results differ from the model's own by rounding.

    The packed weights replace the parameters, which hold no memory meanwhile. Reading a
    parameter (`state_dict`, `save_pretrained`, a copy, a pickle) gives its exact values; writing is
    refused. A tied embedding looks its rows up in the packed weight.

    Args:
        model: of transformers, on the CPU. Written: `forward` of its modules becomes an instance
            attribute, and stand-ins replace the weights.

    Returns:
        The handle whose `undo` restores the model.

    Raises:
        TypeError: model is not a transformers model.
        ValueError: the model is accelerated already.
        NotImplementedError: it has no linear layer that can be packed, because it is patched, on
            another device than the CPU, or in another dtype than float32, float16 or bfloat16.

    Undefined: results after the model was moved or converted, or a module replaced, meanwhile.
    Forwards that need gradients are refused by the ops.

    Source: packing linear weights once, as inference engines for CPUs do.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"accelerate: model must be a transformers model, got {type(model).__name__}"
        )
    if any(isinstance(vars(m).get("forward"), _Replaced) for m in model.modules()):
        raise ValueError("accelerate: model must not be accelerated already, got one that is")
    with torch.inference_mode(False), torch.no_grad():
        return Accelerated(model)


class Accelerated:
    """A model whose linear layers compute from packed weights; made by `accelerate`.

    Args:
        model: see `accelerate`.

    Attributes:
        model: the model.
        num_packed: int, linear layers that were replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        holders = _holders(model)
        family = find_family(model)
        gated: list[Any] = [
            m for m in model.modules() if _is_gated(m, family, model.config, holders)
        ]
        # Gate and up read the same input: one weight.
        groups: list[tuple[nn.Linear, ...]] = [(m.gate_proj, m.up_proj) for m in gated]
        grouped = {linear for group in groups for linear in group}
        seen: set[int] = set()
        for linear in _linears(model, holders):
            if linear not in grouped and id(linear.weight) not in seen:
                seen.add(id(linear.weight))
                groups.append((linear,))
        if not groups:
            raise NotImplementedError(
                "accelerate: model must have an nn.Linear on the CPU, in float32, float16 or "
                "bfloat16 and with the forward of its class, got none"
            )
        self.num_packed = 0
        self._replaced: list[nn.Module] = []
        self._taken: list[PackedProjection] = []
        try:
            self._pack(groups, gated, holders)
            norm = family and family.kind("RMSNorm")
            for module in model.modules():
                if type(module) is norm and "forward" not in vars(module):
                    self._replace(module, _Norm(module))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the model: the same parameters with the same bits, each with separate memory, and
        the modules' forward methods. Undoing twice does nothing."""
        for module in self._replaced:
            if isinstance(vars(module).get("forward"), _Replaced):
                del module.forward
        self._replaced.clear()
        with torch.inference_mode(False), torch.no_grad():
            while self._taken:
                self._taken.pop().restore()
                return_free_memory()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def _pack(
        self,
        groups: Sequence[tuple[nn.Linear, ...]],
        gated: Sequence[Any],
        holders: dict[int, list[nn.Module]],
    ) -> None:
        memory, freed = memory_for(groups), 0
        projections: dict[nn.Module, PackedProjection] = {}
        for linears in groups:
            # The two parameters of a merged pair are used by no other module.
            sharing = holders[id(linears[0].weight)] if len(linears) == 1 else [linears[0]]
            also = [module for module in sharing if module is not linears[0]]
            freed += sum(linear.weight.nbytes for linear in linears)
            taken = PackedProjection(linears, memory, keep_parameters=False, also=also)
            self._taken.append(taken)
            self.num_packed += len(linears)
            if len(linears) == 1:
                for module in sharing:
                    if type(module) is nn.Linear:
                        projections[module] = taken
                        self._replace(module, _Linear(module, taken))
            else:
                projections[linears[0]] = taken
            if freed > _TRIM_BYTES:
                return_free_memory()
                freed = 0
        return_free_memory()
        for module in gated:
            parts = projections[module.gate_proj], projections[module.down_proj]
            self._replace(module, _Gated(module, *parts))

    def _replace(self, module: nn.Module, forward: _Replaced) -> None:
        self._replaced.append(module)
        module.forward = forward  # type: ignore[assignment]


class _Replaced:
    """A module's forward while accelerated. A copy or pickle of the module gets a plain forward."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return _forward_of, (self.module,)


class _Linear(_Replaced):
    def __init__(self, module: nn.Linear, taken: PackedProjection) -> None:
        super().__init__(module)
        self.weight = taken.weight
        # Modules that share a weight may have different biases.
        self.bias = None if module.bias is None else module.bias.data

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return _project(input, self.weight, self.bias)


class _Gated(_Replaced):
    """`down(silu(gate(x)) * up(x))`, with gate and up in one weight."""

    def __init__(self, module: Any, gate_up: PackedProjection, down: PackedProjection) -> None:
        super().__init__(module)
        self.gate_up, self.down = (gate_up.weight, gate_up.bias), (down.weight, down.bias)
        linears = (module.gate_proj, module.up_proj, module.down_proj)
        # Keeps the dictionaries themselves, so that hooks that are added later are seen.
        self.hooks = [h for m in linears for h in (m._forward_hooks, m._forward_pre_hooks)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if any(self.hooks):
            return type(self.module).forward(self.module, x)
        rows = kernels.silu_and_mul(_project(x.reshape(-1, x.shape[-1]), *self.gate_up))
        return _project(rows, *self.down).view(*x.shape[:-1], -1)


class _Norm(_Replaced):
    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.module.weight
        if hidden_states.dtype != weight.dtype:
            return type(self.module).forward(self.module, hidden_states)
        return kernels.rms_norm(hidden_states, weight, self.module.variance_epsilon)


def _project(
    x: torch.Tensor, weight: kernels.PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear` for an input with any number of dimensions."""
    rows = kernels.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], weight.out_features)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    return MethodType(type(module).forward, module)


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that have a parameter as their `weight`, by the parameter's id. Left out are
    parameters that a module has under another name, which a stand-in could not follow."""
    found: defaultdict[int, list[nn.Module]] = defaultdict(list)
    others = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if name == "weight":
                found[id(parameter)].append(module)
            else:
                others.add(id(parameter))
    return {key: modules for key, modules in found.items() if key not in others}


def _linears(model: nn.Module, holders: dict[int, list[nn.Module]]) -> Iterator[nn.Linear]:
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_packable(module, holders):
            yield module


def _is_packable(module: nn.Module, holders: dict[int, list[nn.Module]]) -> bool:
    """Whether a module is a plain linear one whose forward only uses its weight and bias."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.device.type == "cpu"
        and weight.dtype in SUPPORTED_DTYPES
        and weight.numel() > 0
        and weight.is_contiguous()
        and id(weight) in holders
    )


def _is_gated(
    module: Any, family: Family | None, config: Any, holders: dict[int, list[nn.Module]]
) -> bool:
    """Whether a module is a Llama's feed-forward part with three separate linear modules."""
    if family is None or type(module) is not family.kind("MLP") or "forward" in vars(module):
        return False
    gate, up, down = linears = (module.gate_proj, module.up_proj, module.down_proj)
    return (
        config.hidden_act in SUPPORTED_ACTIVATIONS
        and all(_is_packable(linear, holders) for linear in linears)
        and all(len(holders[id(linear.weight)]) == 1 for linear in linears)
        and (gate.bias is None) == (up.bias is None)
        and gate.weight.dtype == up.weight.dtype == down.weight.dtype
    )
