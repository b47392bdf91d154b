"""What a model must be for the patched Llama pass, checked before anything is changed.

Whatever is not supported is refused here, with what is supported, and never computed wrongly.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUPPORTED_ACTIVATIONS = ("silu", "swish")


def check_model(model: object) -> None:
    """Raise unless `patch_llama` can compute the model.

    Args:
        model: anything.

    Raises:
        TypeError: model is no torch module.
        NotImplementedError: the model, or something in its config, is not supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch_llama: model must be a LlamaForCausalLM, got {type(model).__name__}"
        )
    _supported(
        "model", "a LlamaForCausalLM", type(model).__name__, isinstance(model, LlamaForCausalLM)
    )
    config = model.config
    tensor_parallel = getattr(config, "pretraining_tp", None)
    _supported("pretraining_tp", "1", tensor_parallel, tensor_parallel in (None, 1))
    activation = config.hidden_act
    _supported(
        "hidden_act",
        " or ".join(SUPPORTED_ACTIVATIONS),
        activation,
        activation in SUPPORTED_ACTIVATIONS,
    )
    head_dim = config.head_dim
    _supported(
        "head_dim",
        "a multiple of 8 from 16 to 256",
        head_dim,
        head_dim % 8 == 0 and 16 <= head_dim <= 256,
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    _supported(
        "num_key_value_heads",
        f"a divisor of num_attention_heads ({heads})",
        kv_heads,
        heads % kv_heads == 0,
    )
    num_layers = len(model.model.layers)
    _supported(
        "num_hidden_layers",
        f"from 1 to the model's number of layers ({num_layers})",
        config.num_hidden_layers,
        1 <= config.num_hidden_layers <= num_layers,
    )
    _check_modules(model)
    _check_parameters(model)


def _check_modules(model: LlamaForCausalLM) -> None:
    """A replaced module (quantised, adapted) computes something else than its weights say."""
    body = model.model
    expected = [("model", body, LlamaModel), ("embed_tokens", body.embed_tokens, nn.Embedding)]
    expected += [("norm", body.norm, LlamaRMSNorm), ("lm_head", model.lm_head, nn.Linear)]
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        expected += [("layer", layer, LlamaDecoderLayer), ("self_attn", attention, LlamaAttention)]
        expected += [("mlp", mlp, LlamaMLP)]
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected.append((name, getattr(layer, name), LlamaRMSNorm))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected.append((name, getattr(attention, name), nn.Linear))
        for name in ("gate_proj", "up_proj", "down_proj"):
            expected.append((name, getattr(mlp, name), nn.Linear))
    for name, module, kind in expected:
        _supported(name, f"a plain {kind.__name__}", type(module).__name__, type(module) is kind)


def _check_parameters(model: LlamaForCausalLM) -> None:
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


def _supported(name: str, expected: str, actual: object, is_supported: bool) -> None:
    if not is_supported:
        raise NotImplementedError(f"patch_llama: {name} must be {expected}, got {actual}")
