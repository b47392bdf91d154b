import torch


def extract_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    *,
    total_tokens: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``key[cu_seqlens[i] + t] = key_cache[slots[i], :, starts[i] + t]``, for all t."""
    rows = next(
        (len(given) for given in (slots, starts) if given is not None),
        total_tokens if cu_seqlens is None else len(cu_seqlens) - 1,
    )
    slots = torch.arange(rows) if slots is None else slots
    starts = torch.zeros(rows, dtype=torch.int32) if starts is None else starts
    bounds = list(range(rows + 1)) if cu_seqlens is None else cu_seqlens.tolist()
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
