import torch

from ._eight_bit import dequantize


def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    max_query_length: int | None = None,
    max_length: int | None = None,
    block_table: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(score) @ v`` over the columns ``[start, start + length)`` of every row.

    ``score = scale * q.k``, then ``softcap * tanh(score / softcap)``, then
    ``- slope * |query position - key position|``. What a token does not see never affects it, not
    even a value that is not finite; a token that sees keys whose scores are all -inf gets NaN.
    With ``block_table`` the caches are pages, and column c of row i is column ``c % page`` of page
    ``block_table[i, c // page]``. With scales the keys are ``dequantize(key_cache, key_scale)``.
    """
    assert lengths is not None
    rows = len(lengths)
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(rows + 1)
    if slots is None or block_table is not None:
        slots = torch.arange(rows)
    if starts is None:
        starts = torch.zeros_like(lengths)
    num_queries, num_heads, head_dim = query.shape
    group = num_heads // key_cache.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    result = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full(
        (num_queries, num_heads),
        float("-inf"),
        dtype=torch.promote_types(query.dtype, torch.float32),
    )
    bounds = cu_seqlens_q.tolist()
    places = zip(slots.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    for i, (slot, start, length) in enumerate(places):
        first, last = bounds[i], bounds[i + 1]
        q = query[first:last].transpose(0, 1)
        k_scale, v_scale = key_scale, value_scale
        if block_table is None:
            columns = slice(start, start + length)
            k, v = (cache[slot, :, columns] for cache in (key_cache, value_cache))
            if key_scale is not None and value_scale is not None:
                k_scale, v_scale = key_scale[slot, :, columns], value_scale[slot, :, columns]
        else:
            column = torch.arange(start, start + length, device=query.device)
            page = key_cache.shape[2]
            place = block_table[i, column // page], slice(None), column % page
            k, v = (cache[place].transpose(0, 1) for cache in (key_cache, value_cache))
            if key_scale is not None and value_scale is not None:
                k_scale, v_scale = (x[place].transpose(0, 1) for x in (key_scale, value_scale))
        if k_scale is not None and v_scale is not None:
            k, v = dequantize(k, k_scale, query.dtype), dequantize(v, v_scale, query.dtype)
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        q_position = torch.arange(length - (last - first), length, device=query.device)[:, None]
        k_position = torch.arange(length, device=query.device)[None, :]

        score = scale * (q @ k.transpose(1, 2))
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        if alibi_slopes is not None:
            distance = (q_position - k_position).abs().to(score.dtype)
            score = score - alibi_slopes.to(score.dtype)[:, None, None] * distance
        visible = (q_position >= 0) & (k_position >= 0)
        if causal:
            visible = visible & (k_position <= q_position)
        if window is not None:
            visible = visible & (k_position > q_position - window)
        score = score.masked_fill(~visible, float("-inf"))

        # A sink is one more logit, for a token that has no value.
        sink = score.new_full((num_heads,), float("-inf")) if sinks is None else sinks
        sink = sink.to(score.dtype)[:, None, None].expand(num_heads, last - first, 1)
        logits = torch.cat((score, sink), dim=-1)
        peak = logits.amax(dim=-1, keepdim=True)
        # If every logit is -inf, subtracting 0 makes exp() 0 instead of NaN.
        peak = peak.masked_fill(peak == float("-inf"), 0.0)
        weight = torch.exp(logits - peak)
        total = weight.sum(dim=-1, keepdim=True)
        attended = _weigh(weight[..., :-1], v, visible) / total
        sees = visible.any(dim=-1)[:, None]
        result[first:last] = attended.masked_fill(~sees, 0.0).transpose(0, 1)
        lse[first:last] = (peak + torch.log(total)).squeeze(-1).transpose(0, 1).to(lse.dtype)
    if out is None:
        return (result, lse) if return_lse else result
    if isinstance(out, tuple):
        out[0].copy_(result)
        out[1].copy_(lse)
    else:
        out.copy_(result)
    return out


def _weigh(weight: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """``weight @ value``, where a hidden key's value counts as 0 even if it is not finite.

    weight ``[heads, queries, keys]``, value ``[heads, keys, dim]``, visible ``[queries, keys]``.
    """
    is_finite = value.isfinite()
    total = weight @ value.masked_fill(~is_finite, 0.0)
    # 0 * NaN and 0 * inf are NaN, so such values are added only where they are seen.
    for key in (~is_finite).any(-1).any(0).nonzero().flatten().tolist():
        sees = visible[:, key]
        rest = value[:, key].masked_fill(is_finite[:, key], 0.0)[:, None]
        total[:, sees] += weight[:, sees, key, None] * rest
    return total
