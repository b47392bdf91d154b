import torch


def extract_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    *,
    total_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``key[cu_seqlens[i] + t] = key_cache[slots[i], :, starts[i] + t]``, for all t."""
    bounds = cu_seqlens.tolist()
    packed = []
    for cache in (key_cache, value_cache):
        *layers, _, num_kv_heads, _, head_dim = cache.shape
        out = cache.new_empty((*layers, total_tokens, num_kv_heads, head_dim))
        for i, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            first, last = bounds[i], bounds[i + 1]
            columns = cache[..., slot, :, start : start + last - first, :]
            out[..., first:last, :, :] = columns.transpose(-3, -2)
        packed.append(out)
    return packed[0], packed[1]
