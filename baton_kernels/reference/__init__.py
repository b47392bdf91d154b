"""Definitions of the ops in naive torch: what the kernels are compared with.

Every function has the name and the signature of its op, computes in its inputs' own dtype (float64
tensors give the truth, bfloat16 tensors give plain torch at that dtype), checks nothing and imports
torch only.
"""

from .append_kv import append_kv
from .attention_mask import attention_mask
from .extract_kv import extract_kv
from .insert_kv import insert_kv
from .linear import linear
from .masked_softmax import masked_softmax
from .merge_attention import merge_attention
from .move_kv import move_kv
from .ragged_attention import ragged_attention
from .rms_norm import rms_norm
from .silu_and_mul import silu_and_mul

__all__ = [
    "append_kv",
    "attention_mask",
    "extract_kv",
    "insert_kv",
    "linear",
    "masked_softmax",
    "merge_attention",
    "move_kv",
    "ragged_attention",
    "rms_norm",
    "silu_and_mul",
]
