"""Helpers for testing the Llama patch: small models, and queries decoded by themselves and
together.

Here all tokens of a query are given beforehand (teacher forcing), so that logits can be compared
token by token, independent of sampling.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from ..huggingface import cache_argument
from ..llama import ModelHandle
from ..llama.packed_batch import PackedBatch

VOCAB_SIZE = 97
MAX_POSITIONS = 24
ROPE_PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 6},
}


def small_llama(
    *,
    dtype: torch.dtype = torch.float32,
    rope_type: str = "default",
    seed: int = 0,
    **changes: object,
) -> PreTrainedModel:
    """A random Llama; see `small_decoder`."""
    return small_decoder("Llama", dtype=dtype, rope_type=rope_type, seed=seed, **changes)


def small_decoder(
    prefix: str,
    *,
    dtype: torch.dtype = torch.float32,
    rope_type: str = "default",
    seed: int = 0,
    **changes: object,
) -> PreTrainedModel:
    """A random model whose attention, biases and norms all matter for its logits.

    Args:
        prefix: of its classes in transformers, e.g. "Qwen3".
        dtype: of the weights.
        rope_type: a key of `ROPE_PARAMETERS`; the trained length is `MAX_POSITIONS`.
        seed: of the weights.
        changes: entries of the config.
    """
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **ROPE_PARAMETERS[rope_type]}
    config = getattr(transformers, f"{prefix}Config")(
        **{**sizes, "rope_parameters": rope, "pad_token_id": None, **changes}
    )
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
    # Not `model.to`, which would also round the rotary frequencies; loading a checkpoint does not.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def as_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in float32: the reference for a lower dtype."""
    wide = copy.deepcopy(model)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    return wide


@dataclasses.dataclass(frozen=True, eq=False)
class KnownQuery:
    """Tokens that are known beforehand: `prompt` of them prefilled, the rest decoded one by one."""

    token_ids: torch.Tensor
    prompt: int
    arrival: int = 0

    @classmethod
    def random(cls, length: int, prompt: int, arrival: int = 0) -> KnownQuery:
        """`length` tokens for `small_llama`, always the same ones for the same numbers."""
        generator = torch.Generator().manual_seed(1000 * length + prompt)
        return cls(torch.randint(VOCAB_SIZE, (length,), generator=generator), prompt, arrival)


# Prompts and lengths on both sides of MAX_POSITIONS, more queries than slots; one never decodes.
QUERIES = (
    KnownQuery.random(30, 9),
    KnownQuery.random(19, 17),
    KnownQuery.random(45, 1, arrival=2),
    KnownQuery.random(40, 33, arrival=4),
    KnownQuery.random(12, 12, arrival=5),
)


@torch.no_grad()
def decoded_alone(model: PreTrainedModel, query: KnownQuery) -> torch.Tensor:
    """float32 logits of every token from the unpatched model, prompt first and then one by one."""
    # Dynamic RoPE leaves state in the model; a query by itself starts without any.
    model = copy.deepcopy(model)
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    logits = []
    for tokens in (query.token_ids[: query.prompt], *query.token_ids[query.prompt :, None]):
        logits.append(model(tokens[None], use_cache=True, **cache).logits[0])
    return torch.cat(logits).float()


def decoded_together(
    llama: ModelHandle, queries: Sequence[KnownQuery], *, aligned: bool = False, num_slots: int = 4
) -> list[torch.Tensor]:
    """float32 logits of every token of each query, in one cache: each query enters in its step,
    next to those that decode, and leaves when its tokens are used up. Padding is NaN."""
    cache = llama.new_cache(num_slots, 64, aligned=aligned)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    logits: dict[KnownQuery, list[torch.Tensor]] = {query: [] for query in queries}
    waiting = sorted(queries, key=lambda query: query.arrival)
    running: dict[int, KnownQuery] = {}
    step = 0
    while waiting or running:
        counts = dict.fromkeys(running, 1)
        cache.extend(list(running))
        while waiting and waiting[0].arrival <= step and cache.shape.num_free:
            query = waiting.pop(0)
            # In descending order, so that slots and rows are in different orders.
            slot = max(set(range(num_slots)) - set(running))
            cache.allocate(query.prompt, slot)
            running[slot] = query
            counts[slot] = query.prompt
        step += 1
        if not running:
            continue
        batch = PackedBatch.from_shape(cache.shape, counts, counts.values())
        token_ids = torch.cat(
            [
                running[slot].token_ids[cache.shape.length(slot) - count :][:count]
                for slot, count in counts.items()
            ]
        )
        parts = llama.forward(token_ids, batch, cache, logits="all").split(batch.query_lengths)
        for slot, part in zip(counts, parts, strict=True):
            logits[running[slot]].append(part)
            if cache.shape.length(slot) == len(running[slot].token_ids):
                cache.free(slot)
                del running[slot]
    return [torch.cat(logits[query]) for query in queries]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
