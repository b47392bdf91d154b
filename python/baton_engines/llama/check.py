"""Checks whether the patched Llama pass supports a model, before anything is changed.

An unsupported model is rejected here, with a list of what is supported, and never computed wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .family import SUPPORTED_MODELS, Family, find_family
from .structure import structure_of

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUPPORTED_ACTIVATIONS = ("silu", "swish")


def check_model(model: object) -> Family:
    """The family of a model that `patch_llama` can compute.

    Args:
        model: anything.

    Raises:
        TypeError: model is not a torch module.
        NotImplementedError: the model, or something in its config, is not supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch_llama: model must be a LlamaForCausalLM, got {type(model).__name__}"
        )
    family = find_family(model)
    if family is None:
        raise NotImplementedError(
            f"patch_llama: model must be a {', '.join(SUPPORTED_MODELS[:-1])} or "
            f"{SUPPORTED_MODELS[-1]}, got {_full_name(type(model))}{_advice(type(model))}"
        )
    decoder = structure_of(model)
    config = decoder.config
    tensor_parallel = getattr(config, "pretraining_tp", None)
    _supported("pretraining_tp", "1", tensor_parallel, tensor_parallel in (None, 1))
    activation = config.hidden_act
    _supported(
        "hidden_act",
        " or ".join(SUPPORTED_ACTIVATIONS),
        activation,
        activation in SUPPORTED_ACTIVATIONS,
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    _supported(
        "head_dim",
        "a multiple of 8 from 16 to 256",
        head_dim,
        head_dim % 8 == 0 and 16 <= head_dim <= 256,
    )
    _supported(
        "num_key_value_heads",
        f"a divisor of num_attention_heads ({heads})",
        kv_heads,
        heads % kv_heads == 0,
    )
    num_layers = len(decoder.model.layers)
    _supported(
        "num_hidden_layers",
        f"from 1 to the model's number of layers ({num_layers})",
        config.num_hidden_layers,
        1 <= config.num_hidden_layers <= num_layers,
    )
    _check_modules(model, family)
    _check_forwards(model, family)
    _check_parameters(model)
    return family


def _check_modules(model: nn.Module, family: Family) -> None:
    """Rejects replaced modules (quantised, adapted): they do more than their weights say."""
    decoder, norm = structure_of(model), family.kind("RMSNorm")
    body = decoder.model
    expected: list[tuple[str, object, type[Any]]] = [("model", body, family.kind("Model"))]
    expected += [("embed_tokens", body.embed_tokens, nn.Embedding)]
    expected += [("norm", body.norm, norm), ("lm_head", decoder.lm_head, nn.Linear)]
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        expected += [("layer", layer, family.kind("DecoderLayer"))]
        expected += [("self_attn", attention, family.kind("Attention"))]
        expected += [("mlp", mlp, family.kind("MLP"))]
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected.append((name, getattr(layer, name), norm))
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                expected.append((name, getattr(attention, name), norm))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected.append((name, getattr(attention, name), nn.Linear))
        for name in ("gate_proj", "up_proj", "down_proj"):
            expected.append((name, getattr(mlp, name), nn.Linear))
    names: dict[object, str] = {module: name for name, module in model.named_modules()}
    for name, module, kind in expected:
        if type(module) is kind:
            continue
        where = names.get(module, name)
        actual = f"{_full_name(type(module))}{_advice(type(module))}"
        _supported(where, f"a plain {kind.__name__}", actual, False)


def foreign_hooks(model: nn.Module) -> Iterator[str]:
    """The names of modules with a forward hook that the packed pass would not call.

    The hooks with which transformers itself records hidden states and attentions do not count:
    they act only in a forward that requests these.
    """
    for name, module in model.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if any(is_foreign(hook) for hook in hooks.values()):
                yield name or "model"


def is_foreign(hook: object) -> bool:
    """Whether a forward hook is the user's and not one of transformers' own recorders."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _check_forwards(model: nn.Module, family: Family) -> None:
    """Rejects code outside of the modules' own forward methods, which would silently not run."""
    kind = type(model)
    _supported(
        "forward",
        f"that of {family.model.__name__}",
        f"one that {_full_name(kind)} overrides",
        kind.forward is family.model.forward,
    )
    hooked = next(foreign_hooks(model), None)
    _supported(
        "modules",
        "free of forward hooks, which the packed pass does not call",
        f"a hook on {hooked}; remove it first",
        hooked is None,
    )
    replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    # A forward that hides the model's own is called by unpatched calls, and is restored by undo.
    replaced = [name for name in replaced if name]
    _supported(
        "modules",
        "called through the forward of their class",
        f"another forward on {replaced[0] if replaced else None} "
        "(accelerate's offloading does that; load the model without device_map)",
        not replaced,
    )


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        kind = type(parameter)
        _supported(
            name, "a plain Parameter", f"{_full_name(kind)}{_advice(kind)}", kind is nn.Parameter
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    _supported(
        "dtype of all weights",
        "one of float32, float16, bfloat16",
        ", ".join(sorted(map(str, dtypes))),
        len(dtypes) == 1 and dtypes <= set(SUPPORTED_DTYPES),
    )
    devices = {str(parameter.device) for parameter in model.parameters()}
    _supported(
        "device of all weights",
        "one device that holds data",
        ", ".join(sorted(devices)),
        len(devices) == 1 and "meta" not in devices,
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _advice(kind: type) -> str:
    """Advice on a class that replaces one of the model's."""
    package = kind.__module__
    if package.split(".")[0] == "peft":
        return "; merge the adapter first: model = model.merge_and_unload()"
    if any(word in package.lower() for word in ("quant", "bitsandbytes", "torchao", "awq")):
        return "; load the model with unquantised weights"
    return ""


def _supported(name: str, expected: str, actual: object, is_supported: bool) -> None:
    if not is_supported:
        raise NotImplementedError(f"patch_llama: {name} must be {expected}, got {actual}")
