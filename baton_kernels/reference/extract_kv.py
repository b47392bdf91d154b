import torch

from ._eight_bit import as_they_are, dequantize


def extract_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    *,
    total_tokens: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``key[cu_seqlens[i] + t] = key_cache[slots[i], :, starts[i] + t]``, for all t.

    From caches with scales: ``dequantize(...)`` to ``dtype``, or the stored tokens.
    """
    rows = next(
        (len(given) for given in (slots, starts) if given is not None),
        total_tokens if cu_seqlens is None else len(cu_seqlens) - 1,
    )
    slots = torch.arange(rows) if slots is None else slots
    starts = torch.zeros(rows, dtype=torch.int32) if starts is None else starts
    bounds = list(range(rows + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    if out is None:
        *layers, _, num_kv_heads, _, head_dim = key_cache.shape
        size = head_dim + 4 if key_scale is not None and dtype is None else head_dim
        shape = (*layers, total_tokens, num_kv_heads, size)
        dtype = key_cache.dtype if dtype is None else dtype
        out = key_cache.new_empty(shape, dtype=dtype), key_cache.new_empty(shape, dtype=dtype)
    for cache, scale, packed in zip(
        (key_cache, value_cache), (key_scale, value_scale), out, strict=True
    ):
        for i, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            first, last = bounds[i], bounds[i + 1]
            place = slice(start, start + last - first)
            columns = cache[..., slot, :, place, :]
            if scale is not None and packed.dtype == cache.dtype:
                columns = as_they_are(columns, scale[..., slot, :, place])
            elif scale is not None:
                columns = dequantize(columns, scale[..., slot, :, place], packed.dtype)
            packed[..., first:last, :, :] = columns.transpose(-3, -2)
    return out
