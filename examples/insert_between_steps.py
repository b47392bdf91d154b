"""A query leaves and another enters between two decode steps; the others' bits do not change.

The same four steps run twice: once for two queries that stay, once with a third that leaves after
the first step and a newcomer that takes its slot. No layer, no model: only the cache and attention.
"""

import torch

from baton_kernels import KVCache, append_kv, ragged_attention

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 64


def prefilled(name: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for a prefill: keys and values of all layers."""
    random = torch.Generator().manual_seed(name)
    key, value = torch.randn(2, LAYERS, tokens, KV_HEADS, HEAD_DIM, generator=random)
    return key, value


def decode_step(cache: KVCache, rows: dict[int, int], step: int) -> dict[int, torch.Tensor]:
    """One new token per row (name -> slot); attention's result for each, all layers."""
    cache.extend(rows.values())
    slots, starts, lengths = cache.shape.tensors(list(rows.values()))
    cu_seqlens_q = torch.arange(len(rows) + 1, dtype=torch.int32)
    outs = []
    for layer in range(LAYERS):
        # Stands in for a projection of the last token: random, but the same in both runs.
        tokens = [
            torch.randn(
                HEADS + 2 * KV_HEADS, HEAD_DIM,
                generator=torch.Generator().manual_seed(1000 * name + 10 * step + layer),
            )
            for name in rows
        ]  # fmt: skip
        query, key, value = torch.stack(tokens).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        caches = cache.layer(layer)
        append_kv(key, value, *caches, slots, columns=starts + lengths - 1)
        outs.append(ragged_attention(query, *caches, cu_seqlens_q, slots, starts, lengths))
    return dict(zip(rows, torch.stack(outs, dim=1), strict=True))


@torch.inference_mode()
def run(with_relay: bool) -> list[dict[int, torch.Tensor]]:
    cache = KVCache(LAYERS, num_slots=3, num_kv_heads=KV_HEADS, capacity=512, head_dim=HEAD_DIM)
    names = {1: 100, 2: 7, **({3: 31} if with_relay else {})}
    rows = {name: cache.insert(*prefilled(name, tokens)) for name, tokens in names.items()}
    results = [decode_step(cache, rows, 0)]
    if with_relay:
        slot = rows.pop(3)
        cache.free(slot)
        rows[4] = cache.insert(*prefilled(4, 250))
        print(f"query 3 left, query 4 of 250 tokens took its slot {slot}; nothing else moved")
        assert rows[4] == slot and cache.bytes_moved == 0
    return results + [decode_step(cache, rows, step) for step in (1, 2, 3)]


alone, together = run(with_relay=False), run(with_relay=True)
for name in (1, 2):
    equal = all(torch.equal(a[name], b[name]) for a, b in zip(alone, together, strict=True))
    print(f"query {name}: the same bits in all {len(alone)} steps: {equal}")
    assert equal
