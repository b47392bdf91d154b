"""The ops: one file each, with the public function, its checks and its fake implementation."""

from baton_kernels.ops.append_kv import append_kv
from baton_kernels.ops.attention_mask import attention_mask
from baton_kernels.ops.extract_kv import extract_kv
from baton_kernels.ops.insert_kv import insert_kv
from baton_kernels.ops.likeliest import likeliest
from baton_kernels.ops.linear import linear
from baton_kernels.ops.masked_softmax import masked_softmax
from baton_kernels.ops.merge_attention import merge_attention
from baton_kernels.ops.move_kv import move_kv
from baton_kernels.ops.ragged_attention import ragged_attention
from baton_kernels.ops.rms_norm import rms_norm
from baton_kernels.ops.silu_and_mul import silu_and_mul

__all__ = [
    "append_kv",
    "attention_mask",
    "extract_kv",
    "insert_kv",
    "likeliest",
    "linear",
    "masked_softmax",
    "merge_attention",
    "move_kv",
    "ragged_attention",
    "rms_norm",
    "silu_and_mul",
]
