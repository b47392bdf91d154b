"""Other attention kernels for GPUs, if they are installed, called as their documentation says.

Each takes the same cache through views; planning and packing beforehand are not timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .attention_work import AttentionWork
from .measure import Way, describe

# The most bytes of packed copies that a peer may need.
MOST_PACKED = 8 << 30


def decode_peers(work: AttentionWork) -> list[Way]:
    """The peers for one query token per row."""
    return [
        _installed("fa3_fwd", "FlashAttention-3", _flash_attention_3, work),
        _installed("flash_attn", "flash-attn, with_kvcache", _flash_attn, work),
        _installed("flashinfer", "FlashInfer, a page per slot", _flashinfer, work),
        _installed("torch", "torch varlen_attn", _varlen, work),
        _installed("torch", "SDPA, flash", functools.partial(_sdpa, "FLASH_ATTENTION"), work),
        _installed("torch", "SDPA, cuDNN", functools.partial(_sdpa, "CUDNN_ATTENTION"), work),
    ]


def prefill_peers(work: AttentionWork) -> list[Way]:
    """The peers for rows that compute all of their tokens."""
    return [
        _installed("fa3_fwd", "FlashAttention-3", _flash_attention_3, work),
        _installed("torch", "torch varlen_attn", _varlen, work),
        _installed("torch", "SDPA, flash", functools.partial(_sdpa, "FLASH_ATTENTION"), work),
        _installed("torch", "SDPA, cuDNN", functools.partial(_sdpa, "CUDNN_ATTENTION"), work),
    ]


def _installed(
    module: str, name: str, make: Callable[[AttentionWork], list[Callable]], work: AttentionWork
) -> Way:
    if importlib.util.find_spec(module) is None:
        return Way(name, missing=f"{module} is not installed")
    try:
        calls = make(work)
        calls[0]()
    except Exception as error:  # its refusal is the result
        return Way(name, missing=describe(error))
    return Way(name, calls, work.check, reset=work.finite_padding)


def _window(work: AttentionWork) -> tuple[int, int]:
    """flash-attention's window_size: tokens seen to the left of a token, and to its right."""
    return (-1, -1) if work.window is None else (work.window - 1, 0)


def _equal_queries(work: AttentionWork) -> torch.Tensor:
    """`[rows, tokens, heads, dim]`.

    Raises:
        ValueError: Rows compute different numbers of tokens.
    """
    if len(set(work.query_lengths)) != 1:
        raise ValueError("rows must compute equally many tokens")
    return work.query.view(len(work.lengths), -1, *work.query.shape[1:])


def _flash_attention_3(work: AttentionWork) -> list[Callable]:
    from fa3_fwd_interface import flash_attn_with_kvcache

    query = _equal_queries(work)
    _, starts, lengths = work.index
    # There, columns are counted from 0 and include the padding on the left.
    ends = (starts + lengths).to(torch.int32)
    options = {"cache_leftpad": starts} if any(work.starts) else {}
    return [
        functools.partial(
            flash_attn_with_kvcache, query, keys.transpose(1, 2), values.transpose(1, 2),
            cache_seqlens=ends, causal=True, window_size=_window(work), **options,
        )
        for keys, values in map(work.cache.layer, range(work.layers))
    ]  # fmt: skip


def _flash_attn(work: AttentionWork) -> list[Callable]:
    from flash_attn import flash_attn_with_kvcache

    if any(work.starts):
        raise ValueError("rows must begin in column 0")
    options = {} if work.window is None else {"window_size": _window(work)}
    query, lengths = _equal_queries(work), work.index[2]
    return [
        functools.partial(
            flash_attn_with_kvcache, query, keys.transpose(1, 2), values.transpose(1, 2),
            cache_seqlens=lengths, **options,
        )
        for keys, values in map(work.cache.layer, range(work.layers))
    ]  # fmt: skip


def _flashinfer(work: AttentionWork) -> list[Callable]:
    import flashinfer

    if any(work.starts):
        raise ValueError("rows must begin in column 0")
    heads = work.heads
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=work.device)
    # Heads that share keys are the rows of a matrix product, as FlashInfer's own engines choose it.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=heads.query >= 4 * heads.kv
    )
    slots, _, lengths = work.index
    options = {} if work.window is None else {"window_left": work.window - 1}
    wrapper.plan(
        work.cu_seqlens, slots, lengths, heads.query, heads.kv, heads.dim, work.capacity,
        q_data_type=work.dtype, kv_data_type=work.dtype, **options,
    )  # fmt: skip
    return [
        functools.partial(wrapper.run, work.query, work.cache.layer(layer))
        for layer in range(work.layers)
    ]


def _varlen(work: AttentionWork) -> list[Callable]:
    """Keys and values are packed beforehand, because this function has no cache."""
    from torch.nn.attention.varlen import varlen_attn

    if work.bytes * work.layers > MOST_PACKED:
        raise ValueError(f"keys and values would be packed to {work.bytes * work.layers / 1e9} GB")
    group = work.heads.query // work.heads.kv
    longest = max(work.lengths)
    bounds = torch.zeros_like(work.cu_seqlens)
    bounds[1:] = work.index[2].cumsum(0)
    # A decoded token sees all of its row; `window_size` has flash-attention's form.
    left = _window(work)[0]
    options = {"window_size": (left, 0)}
    calls = []
    for layer in range(work.layers):
        rows = [work.row(layer, row) for row in range(len(work.lengths))]
        key, value = (torch.cat([pair[i].transpose(0, 1) for pair in rows]) for i in range(2))
        call = functools.partial(
            varlen_attn, work.query, key, value, work.cu_seqlens, bounds,
            max(work.query_lengths), longest, **options,
        )  # fmt: skip
        calls.append(call)
        if layer == 0 and group > 1:
            try:
                call()
            except Exception:
                # Some releases share heads only if they are told to.
                options["enable_gqa"] = True
                calls[0] = functools.partial(call, enable_gqa=True)
    return calls


def _sdpa(backend: str, work: AttentionWork) -> list[Callable]:
    """torch's scaled_dot_product_attention with one backend; it does not support lengths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if any(work.starts) or set(work.lengths) != {work.capacity} or work.window is not None:
        raise ValueError("rows must fill their slots")
    query = _equal_queries(work).transpose(1, 2)
    causal, gqa = query.shape[2] > 1, work.heads.query != work.heads.kv

    def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = sdpa(query, keys, values, is_causal=causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    return [functools.partial(attend, *work.cache.layer(layer)) for layer in range(work.layers)]
