"""Other ways of computing attention for a ragged batch in a dense cache.

Masks, block masks and views are made beforehand, so only attention is timed. Each returns the
packed output, as `ragged_attention` does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .attention_work import AttentionWork
from .measure import Way, describe

# The most bytes of repeated keys and values: more does not fit the memory of a small machine.
MAX_REPEATED = 6 << 30


def decode_peers(work: AttentionWork, flex: bool = True) -> list[Way]:
    """Peers on a batch of one query token per row."""
    ways = [eager(work), dense_sdpa(work), row_sdpa(work)]
    return [*ways, flex_attention(work)] if flex else ways


def _mask(work: AttentionWork) -> tuple[torch.Tensor, int]:
    """Visible columns `[rows, 1, 1, width]`; width is where the longest row ends."""
    _, starts, lengths = work.index
    width = max(s + n for s, n in zip(work.starts, work.lengths, strict=True))
    columns = torch.arange(width, device=work.device)
    visible = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    return visible[:, None, None], width


def _layers(work: AttentionWork, attend: Callable, width: int) -> list[Callable]:
    return [
        functools.partial(attend, keys[:, :, :width], values[:, :, :width])
        for keys, values in map(work.cache.layer, range(work.dense_layers))
    ]


def eager(work: AttentionWork) -> Way:
    """transformers' eager attention: keys and values repeated per query head, additive mask."""
    name = "transformers eager"
    if importlib.util.find_spec("transformers") is None:
        return Way(name, missing="transformers is not installed")
    visible, width = _mask(work)
    repeated = 2 * len(work.lengths) * width * work.heads.query * work.heads.dim
    repeated *= work.dtype.itemsize
    if repeated > MAX_REPEATED:
        return Way(name, missing=f"it would repeat keys and values to {repeated / 1e9:.1f} GB")
    from transformers.models.llama.modeling_llama import eager_attention_forward

    mask = torch.zeros_like(visible, dtype=work.dtype)
    mask.masked_fill_(~visible, torch.finfo(work.dtype).min)
    module = SimpleNamespace(num_key_value_groups=work.heads.query // work.heads.kv, training=False)
    query = work.query[:, :, None]

    def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return eager_attention_forward(
            module, query, keys, values, mask, scaling=work.heads.dim**-0.5
        )[0]

    return Way(name, _layers(work, attend, width), work.check, reset=work.finite_padding)


def dense_sdpa(work: AttentionWork) -> Way:
    """torch's scaled_dot_product_attention on the padded batch."""
    visible, width = _mask(work)
    query, gqa = work.query[:, :, None], work.heads.query != work.heads.kv

    def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return sdpa(query, keys, values, attn_mask=visible, enable_gqa=gqa)

    return Way(
        "SDPA, enable_gqa, dense mask",
        _layers(work, attend, width),
        work.check,
        reset=work.finite_padding,
    )


def row_sdpa(work: AttentionWork) -> Way:
    """One call per row without padding: the query heads of a KV head become query tokens."""
    group = work.heads.query // work.heads.kv
    queries = work.query.view(-1, 1, work.heads.kv, group, work.heads.dim)

    def attend(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        outs = [sdpa(q, k, v) for q, (k, v) in zip(queries, rows, strict=True)]
        return torch.cat(outs)

    calls = []
    for layer in range(work.layers):
        rows = [work.row(layer, row) for row in range(len(work.lengths))]
        calls.append(functools.partial(attend, [(k[None], v[None]) for k, v in rows]))
    return Way("SDPA per row, heads folded", calls, work.check, reset=work.finite_padding)


def flex_attention(work: AttentionWork) -> Way:
    """torch's FlexAttention, compiled, with folded heads; it skips blocks of padding."""
    name = "FlexAttention, heads folded"
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    _, starts, lengths = work.index
    ends = starts + lengths
    width = max(s + n for s, n in zip(work.starts, work.lengths, strict=True))
    rows, heads = len(work.lengths), work.heads
    group = heads.query // heads.kv

    def visible(b, h, q, k):
        return (k >= starts[b]) & (k < ends[b])

    blocks = create_block_mask(visible, rows, None, group, width, device=work.device)
    query = work.query.view(rows, heads.kv, group, heads.dim)
    # Compiled for this shape only; earlier compilations would count towards a limit.
    torch.compiler.reset()
    compiled = torch.compile(flex, dynamic=False)

    def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return compiled(query, keys, values, block_mask=blocks)

    calls = _layers(work, attend, width)
    try:
        with torch.inference_mode():
            calls[0]()
    except Exception as error:  # a compiler may fail in any way
        return Way(name, missing=describe(error))
    return Way(name, calls, work.check, reset=work.finite_padding)
