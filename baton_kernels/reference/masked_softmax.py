import torch


def masked_softmax(
    scores: torch.Tensor,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    window: int | None = None,
) -> torch.Tensor:
    """``softmax(scale * scores)`` over the columns that each query sees; zeros elsewhere.

    A query sees ``start <= column <= query column`` and ``column > query column - window``; the
    query columns of a row are the last ``query_length`` before its end.
    """
    assert lengths is not None
    starts = torch.zeros_like(lengths) if starts is None else starts
    query_length, key_length = scores.shape[2:]
    first = starts.long()[:, None, None, None]
    offset = torch.arange(query_length, device=scores.device)[:, None]
    query_column = first + lengths.long()[:, None, None, None] - query_length + offset
    column = torch.arange(key_length, device=scores.device)
    visible = (column >= first) & (column <= query_column)
    if window is not None:
        visible = visible & (column > query_column - window)
    if key_length == 0:
        return scores.new_empty(scores.shape)
    score = torch.where(visible, scale * scores, float("-inf"))
    peak = score.amax(dim=-1, keepdim=True)
    # If nothing is visible, every score is -inf, and subtracting 0 makes exp() 0 instead of NaN.
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weight = torch.exp(score - peak)
    total = weight.sum(dim=-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1.0)
