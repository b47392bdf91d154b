import torch


def extract_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    *,
    total_tokens: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``key[cu_seqlens[i] + t] = key_cache[slots[i], :, starts[i] + t]``, for all t."""
    bounds = cu_seqlens.tolist()
    if out is None:
        *layers, _, num_kv_heads, _, head_dim = key_cache.shape
        shape = (*layers, total_tokens, num_kv_heads, head_dim)
        out = key_cache.new_empty(shape), key_cache.new_empty(shape)
    for cache, packed in zip((key_cache, value_cache), out, strict=True):
        for i, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            first, last = bounds[i], bounds[i + 1]
            columns = cache[..., slot, :, start : start + last - first, :]
            packed[..., first:last, :, :] = columns.transpose(-3, -2)
    return out
