"""`attn_implementation="baton"`: `ragged_attention` inside any transformers model.

`register` adds a mask function and an attention function under the name "baton" to transformers'
public registries. The mask function says where each row's valid columns are (`row_mask`), and the
attention function calls `ragged_attention` on keys and values where they lie in the model's cache:
no 4-D mask, no repeated KV heads, no copy. Where that is not possible, transformers' own sdpa
computes the attention, with one warning per reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from baton_kernels import ragged_attention

from . import row_mask

NAME = "baton"
_log = logging.getLogger(__name__)

# How often sdpa computed the attention, by reason; compiled code is not counted.
fallbacks: Counter[str] = Counter()


class PackedRows(NamedTuple):
    """The rows of packed tokens over a slot cache, as `ragged_attention` takes them; given to a
    model as the keyword `baton_rows`, which it hands to every attention layer.

    Attributes:
        cu_seqlens_q, slots, starts, lengths: see `ragged_attention`.
        max_query_length, max_length: bounds that the host knows.
    """

    cu_seqlens_q: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    max_query_length: int
    max_length: int


def register() -> None:
    """Make `attn_implementation="baton"` known to transformers; calling it again changes nothing.

    Importing `baton_engines.huggingface` does it. Then `from_pretrained(...,
    attn_implementation="baton")` and `model.set_attn_implementation("baton")` work for every model
    that uses transformers' attention interface, `generate` and pipelines included.

    Source: AttentionInterface and AttentionMaskInterface of transformers.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor:
    """The mask of one step and layer type: encoded rows (`row_mask`), or sdpa's dense mask.

    Args:
        batch_size: rows.
        q_length, kv_length: query tokens and key columns per row.
        q_offset: tokens of a row before this step; a tensor where the cache keeps it on a device.
        kv_offset: tokens that the layer's cache has dropped on the left.
        mask_function, allow_is_causal_skip, use_vmap, local_size, options: see `sdpa_mask`.
        attention_mask: bool `[batch_size, tokens]`: 0 for padding; None without padding.
        config: the model's.
        device: of the mask.
    """
    window = row_mask.find_window(
        mask_function,
        q_length,
        local_size,
        getattr(config, "sliding_window", None),
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
    )
    if "allow_is_bidirectional_skip" in options:
        window = row_mask.NOT_CAUSAL
    if isinstance(window, str):
        why = window
    else:
        # Reading the values waits for the device, which a decode step must not do, and a compiled
        # graph cannot branch on them. In these cases a row that cannot be expressed gives NaN.
        readable = q_length > 1 or _is_on_host(attention_mask)
        checked = readable and not torch.compiler.is_compiling()
        encoded = row_mask.encode(
            batch_size,
            q_offset + q_length,
            kv_offset,
            window,
            attention_mask,
            device,
            checked=checked,
        )
        if encoded is not None:
            return encoded
        why = row_mask.NOT_LEFT_PADDED
    _warn_once(why)
    options.setdefault("allow_is_bidirectional_skip", False)
    dense = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # transformers passes tensors too
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        local_size=local_size,
        device=device,
        **options,
    )
    if dense is None:
        dense = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    return dense


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    baton_rows: PackedRows | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """One layer's attention.

    Args:
        module: the model's attention layer.
        query: `[batch, num_heads, q_length, head_dim]`, rotated. Packed: batch 1, all tokens.
        key, value: `[batch, num_kv_heads, columns, head_dim]`, as the cache holds them. Packed: the
            slot cache.
        attention_mask: what `mask` returned, or a dense mask of the user's.
        dropout, position_bias, is_causal: not supported unless they are off.
        scaling, softcap: see `ragged_attention`.
        sliding_window: ignored. The mask knows the window: some models that slide do not pass it
            (Qwen2-MoE, PhiMoE), and the mask says which layers slide.
        s_aux: `[num_heads]`: attention sinks.
        baton_rows: rows of packed tokens.
        options: other arguments that models pass; handed on to sdpa.

    Returns:
        `[batch, q_length, num_heads, head_dim]`, and None for the weights, which never exist.

    Raises:
        NotImplementedError: sinks or softcap with a mask that only sdpa could apply.
    """
    batch, num_heads, q_length, head_dim = query.shape
    sinks = None if s_aux is None else s_aux.detach().float()
    if baton_rows is not None:
        if not row_mask.is_encoded(attention_mask) or query.shape[-1] != value.shape[-1]:
            raise NotImplementedError(
                "AnyModel: attention of every layer must be causal, with or without a sliding "
                "window, over keys and values of one head dimension, got another"
            )
        *index, max_query_length, max_length = baton_rows
        out = ragged_attention(
            query[0].transpose(0, 1),
            key,
            value,
            *index,
            scale=scaling,
            window=row_mask.decode(attention_mask).window,
            softcap=softcap or 0.0,
            sinks=sinks,
            max_query_length=max_query_length,
            max_length=max_length,
        )
        return out[None], None
    rows = _rows_or_why_not(query, key, value, attention_mask, dropout, position_bias, is_causal)
    if isinstance(rows, str):
        return _sdpa(
            rows, module, query, key, value, attention_mask, sinks=s_aux, dropout=dropout,
            scaling=scaling, softcap=softcap, is_causal=is_causal, position_bias=position_bias,
            **options,
        )  # fmt: skip
    # One token per row is the op's default, so there is no need for cu_seqlens.
    cu_seqlens = None
    if q_length != 1:
        cu_seqlens = torch.arange(0, batch * q_length + 1, q_length, device=query.device).int()
    out = ragged_attention(
        query.transpose(1, 2).reshape(batch * q_length, num_heads, head_dim),
        key,
        value,
        cu_seqlens,
        None,
        rows.starts,
        rows.lengths,
        scale=scaling,
        window=rows.window,
        softcap=softcap or 0.0,
        sinks=sinks,
        max_query_length=q_length,
        max_length=key.shape[2],
    ).view(batch, q_length, num_heads, head_dim)
    if rows.unexpressed is not None:
        out = out.masked_fill(rows.unexpressed[:, None, None, None], float("nan"))
    return out, None


def _is_on_host(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.device.type == "cpu"


def _rows_or_why_not(
    query, key, value, attention_mask, dropout, position_bias, is_causal
) -> row_mask.Rows | str:
    """The rows for `ragged_attention` in this layer, or the reason why it cannot compute them."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are needed"
    if dropout:
        return "dropout is on"
    if position_bias is not None:
        return "a position bias is added to the scores"
    if value.shape[-1] != query.shape[-1]:
        return "values have another head dimension than keys"
    if query.shape[-1] % 8 or not 16 <= query.shape[-1] <= 256:
        return f"the head dimension is {query.shape[-1]}"
    if not row_mask.is_encoded(attention_mask):
        return "the mask is dense"
    if is_causal is False:
        return row_mask.NOT_CAUSAL
    return row_mask.decode(attention_mask)


def _sdpa(
    why: str, module, query, key, value, attention_mask, *, sinks, softcap, **options
) -> tuple[torch.Tensor, None]:
    if not torch.compiler.is_compiling():
        fallbacks[why] += 1
    _warn_once(why)
    for name, given in (("attention sinks", sinks is not None), ("softcap", bool(softcap))):
        if given:
            raise NotImplementedError(
                f'attn_implementation="baton": {name} must come with a causal mask padded on the '
                f"left, because sdpa lacks it, got a layer where {why}; "
                'use attn_implementation="eager"'
            )
    if row_mask.is_encoded(attention_mask):
        rows = row_mask.decode(attention_mask)
        attention_mask = row_mask.to_dense(rows, query.shape[2], key.shape[2])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


_warned: set[str] = set()


def _warn_once(why: str) -> None:
    if torch.compiler.is_compiling() or why in _warned:
        return
    _warned.add(why)
    _log.warning('attn_implementation="baton" computes by sdpa where %s', why)
