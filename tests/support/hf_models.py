"""Small random transformers decoders with every kind of attention, and prompts for them."""

from __future__ import annotations

import functools

import torch
import transformers

from baton_engines.huggingface import cache_argument

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2}
_QWEN_MOE = {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 48}

# Tokens of an answer.
NEW = 24

# Name -> (prefix of the classes, differences from `_SMALL`); None leaves a setting out.
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "mistral_window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {}),
    "gemma2_softcap": ("Gemma2", {"sliding_window": 8, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"sliding_window": 8}),
    "gpt_oss_sinks": ("GptOss", {**_EXPERTS, "sliding_window": 8, "num_local_experts": 4}),
    "phi3_window": ("Phi3", {"sliding_window": 8, "head_dim": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 8}),
    "gpt_neox": ("GPTNeoX", {}),
    "cohere2": ("Cohere2", {"sliding_window": 8}),
    "granite": ("Granite", {}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2_window": ("Starcoder2", {"sliding_window": 8}),
    "qwen3_moe": ("Qwen3Moe", _QWEN_MOE),
    # Its layers pass no window to the attention function; only the mask knows it.
    "qwen2_moe_window": (
        "Qwen2Moe",
        {
            **_QWEN_MOE,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}
# Cannot be expressed as one span of columns per row.
LLAMA4 = (
    "Llama4",
    {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "num_local_experts": 2},
)


@functools.cache
def make(name: str, **sizes: int) -> transformers.PreTrainedModel:
    """The model of that name in float32, with other sizes if given; the same object each time."""
    prefix, changes = LLAMA4 if name == "llama4" else MODELS[name]
    settings = {**_SMALL, **changes, **sizes}
    settings = {key: value for key, value in settings.items() if value is not None}
    # Both are set, because their defaults lie outside the small vocabulary.
    settings["eos_token_id"] = None
    text = "TextConfig" if prefix in ("Gemma3", "Llama4") else "Config"
    torch.manual_seed(0)
    # The first test to use it may run in inference mode, whose tensors torch.export rejects.
    with torch.inference_mode(False):
        model = getattr(transformers, f"{prefix}ForCausalLM")(
            getattr(transformers, f"{prefix}{text}")(**settings)
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Larger than initialized: with tiny weights every token has about the same logits.
                torch.nn.init.normal_(parameter.data, 0, 0.15)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompts(lengths=(27, 3, 40, 12, 33, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded token ids and their mask, `[rows, longest]` each."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(5, 320, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return ids, mask


def generate(model, attention: str, ids, mask, new_tokens: int = 24, **options) -> torch.Tensor:
    """Greedy tokens of every row with an attention implementation; the option `cache` is passed
    under the name that the model uses."""
    if "cache" in options:
        options[cache_argument(model)] = options.pop("cache")
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return out[:, ids.shape[1] :]


@functools.cache
def expected(name: str, beams: int = 1) -> torch.Tensor:
    """The tokens that eager attention generates."""
    options = {"num_beams": beams} if beams > 1 else {}
    return generate(make(name), "eager", *prompts(), NEW, **options)
