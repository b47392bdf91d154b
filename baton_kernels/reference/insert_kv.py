import torch


def insert_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    *,
    zero_padding: bool = False,
) -> None:
    """``key_cache[slots[i], :, starts[i] + t] = key[cu_seqlens[i] + t]``, for all t."""
    bounds = cu_seqlens.tolist()
    for i, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        first, last = bounds[i], bounds[i + 1]
        for packed, cache in ((key, key_cache), (value, value_cache)):
            if zero_padding:
                cache[..., slot, :, :start, :] = 0
            tokens = packed[..., first:last, :, :]
            cache[..., slot, :, start : start + last - first, :] = tokens.transpose(-3, -2)
