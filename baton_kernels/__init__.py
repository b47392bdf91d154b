"""KV cache insertion, removal and attention over ragged shaped batches, as kernels.

The ops and what they compute: `baton_kernels.ops`. Their definitions in plain torch:
`baton_kernels.reference`. A cache with its bookkeeping: `KVCache`, `BatchShape`.
"""

from baton_kernels import reference, triton
from baton_kernels.batch_shape import BatchShape, Moves
from baton_kernels.info import build_info
from baton_kernels.kv_cache import KVCache
from baton_kernels.ops import (
    append_kv,
    attention_mask,
    extract_kv,
    insert_kv,
    linear,
    masked_softmax,
    merge_attention,
    move_kv,
    ragged_attention,
    rms_norm,
    silu_and_mul,
)

__all__ = [
    "BatchShape",
    "KVCache",
    "Moves",
    "append_kv",
    "attention_mask",
    "build_info",
    "extract_kv",
    "insert_kv",
    "linear",
    "masked_softmax",
    "merge_attention",
    "move_kv",
    "ragged_attention",
    "reference",
    "rms_norm",
    "silu_and_mul",
    "triton",
]
