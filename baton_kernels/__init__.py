"""KV cache insertion, removal and attention over ragged shaped batches, as kernels.

The ops and what they compute: `baton_kernels.ops`. Their definitions in plain torch:
`baton_kernels.reference`. A cache with its bookkeeping: `KVCache`, `BatchShape`.
"""

from baton_kernels import reference, triton
from baton_kernels.batch_shape import BatchShape, Moves
from baton_kernels.info import __version__, build_info
from baton_kernels.kv_cache import KVCache
from baton_kernels.ops.append_kv import append_kv
from baton_kernels.ops.attention_mask import attention_mask
from baton_kernels.ops.extract_kv import extract_kv
from baton_kernels.ops.insert_kv import insert_kv
from baton_kernels.ops.likeliest import likeliest
from baton_kernels.ops.linear import linear
from baton_kernels.ops.masked_softmax import masked_softmax
from baton_kernels.ops.merge_attention import merge_attention
from baton_kernels.ops.move_kv import move_kv
from baton_kernels.ops.packed_weight import PackedWeight, PanelMemory, pack_linear, panel_bytes
from baton_kernels.ops.ragged_attention import ragged_attention
from baton_kernels.ops.rms_norm import rms_norm
from baton_kernels.ops.silu_and_mul import silu_and_mul
from baton_kernels.threads import use_torch_threads

__all__ = [
    "BatchShape",
    "KVCache",
    "Moves",
    "PackedWeight",
    "PanelMemory",
    "__version__",
    "append_kv",
    "attention_mask",
    "build_info",
    "extract_kv",
    "insert_kv",
    "likeliest",
    "linear",
    "masked_softmax",
    "merge_attention",
    "move_kv",
    "pack_linear",
    "panel_bytes",
    "ragged_attention",
    "reference",
    "rms_norm",
    "silu_and_mul",
    "triton",
    "use_torch_threads",
]
