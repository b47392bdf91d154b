import torch

from ._eight_bit import from_tokens


def insert_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    *,
    zero_padding: bool = False,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """``key_cache[slots[i], :, starts[i] + t] = key[cu_seqlens[i] + t]``, for all t.

    Caches with scales get ``quantize(key)``.
    """
    rows = next(
        (len(given) for given in (slots, starts) if given is not None),
        key.shape[-3] if cu_seqlens is None else len(cu_seqlens) - 1,
    )
    slots = torch.arange(rows) if slots is None else slots
    starts = torch.zeros(rows, dtype=torch.int32) if starts is None else starts
    bounds = list(range(rows + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    for i, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        first, last = bounds[i], bounds[i + 1]
        columns = slice(start, start + last - first)
        for packed, cache, scale in (
            (key, key_cache, key_scale),
            (value, value_cache, value_scale),
        ):
            tokens = packed[..., first:last, :, :].transpose(-3, -2)
            if scale is not None:
                tokens, scale[..., slot, :, columns] = from_tokens(tokens, cache)
                if zero_padding:
                    scale[..., slot, :, :start] = 0
            if zero_padding:
                cache[..., slot, :, :start, :] = 0
            cache[..., slot, :, columns, :] = tokens
