import torch


def attention_mask(
    starts: torch.Tensor | None,
    lengths: torch.Tensor,
    query_length: int,
    key_length: int,
    *,
    dtype: torch.dtype = torch.bool,
    window: int | None = None,
) -> torch.Tensor:
    """``start <= column <= query column`` and ``column > query column - window``.

    The query columns of a row are the last ``query_length`` before its end.
    """
    starts = torch.zeros_like(lengths) if starts is None else starts
    ends = (starts + lengths)[:, None, None, None]
    starts = starts[:, None, None, None]
    offset = torch.arange(query_length, device=starts.device)[None, None, :, None]
    query_column = ends - query_length + offset
    column = torch.arange(key_length, device=starts.device)[None, None, None, :]
    visible = (column >= starts) & (column < ends) & (column <= query_column)
    if window is not None:
        visible = visible & (column > query_column - window)
    if dtype == torch.bool:
        return visible
    hidden = torch.full_like(visible, torch.finfo(dtype).min, dtype=dtype)
    return hidden.masked_fill(visible, 0.0)
