import torch

from ._eight_bit import from_tokens


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    out1 = x1 * cos[..., :half] - x2 * sin[..., :half]
    out2 = x2 * cos[..., -half:] + x1 * sin[..., -half:]
    return torch.cat((out1, out2), dim=-1).to(x.dtype)


def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    *,
    query: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """``key_cache[slots[i], :, columns[i]] = rotate(key[i])``, value unrotated; ``rotate(query)``.

    ``rotate(x) = (x1 cos - x2 sin, x2 cos + x1 sin)`` on the two halves of the head dimension.
    Caches with scales get ``quantize(rotate(key))``.
    """
    if cos is not None and sin is not None:
        key = _rotate(key, cos, sin)
        query = None if query is None else _rotate(query, cos, sin)
    assert columns is not None
    slots = torch.arange(len(key)) if slots is None else slots
    for i, place in enumerate(zip(slots.tolist(), columns.tolist(), strict=True)):
        slot, column = place
        for tokens, cache, scale in (
            (key, key_cache, key_scale),
            (value, value_cache, value_scale),
        ):
            token = tokens[i]
            if scale is not None:
                token, scale[slot, :, column] = from_tokens(token, cache)
            cache[slot, :, column] = token
    return None if query is None else query.clone(memory_format=torch.contiguous_format)
