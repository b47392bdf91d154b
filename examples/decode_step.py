"""One decode step of one layer: append each row's new token to the cache, then attend.

Three queries of 5, 900 and 37 tokens share one cache. Their rows start and end anywhere, and what
lies outside of them is never read: here it is NaN.
"""

import torch

from baton_kernels import append_kv, ragged_attention

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 8, 2, 64, 1024
lengths = torch.tensor([5, 900, 37], dtype=torch.int32)  # before the step
starts = torch.tensor([0, 100, 3], dtype=torch.int32)
slots = torch.tensor([2, 0, 3], dtype=torch.int32)

torch.manual_seed(0)
key_cache, value_cache = torch.full((2, 4, KV_HEADS, CAPACITY, HEAD_DIM), torch.nan)
for slot, start, length in zip(slots, starts, lengths, strict=True):  # as prefill left it
    key_cache[slot, :, start : start + length] = torch.randn(KV_HEADS, length, HEAD_DIM)
    value_cache[slot, :, start : start + length] = torch.randn(KV_HEADS, length, HEAD_DIM)

query = torch.randn(3, HEADS, HEAD_DIM)
key, value = torch.randn(2, 3, KV_HEADS, HEAD_DIM)
with torch.inference_mode():
    append_kv(key, value, key_cache, value_cache, slots, columns=starts + lengths)
    cu_seqlens_q = torch.arange(4, dtype=torch.int32)  # one token per row
    out = ragged_attention(query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths + 1)

for i, (slot, start, length) in enumerate(zip(slots, starts, lengths + 1, strict=True)):
    columns = slice(start, start + length)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[i, :, None], key_cache[slot, :, columns], value_cache[slot, :, columns],
        enable_gqa=True,
    )[:, 0]  # fmt: skip
    error = (out[i] - expected).abs().max().item()
    print(f"row {i}: {length} tokens, {error:.1e} from torch's own attention")
    assert error < 1e-5
