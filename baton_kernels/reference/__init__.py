"""The definitions of the ops in naive torch, with which the kernels are compared.

Every function has the name and the signature of its op and computes in its inputs' own dtype:
float64 tensors give the true result, bfloat16 tensors give plain torch at that dtype. It checks
nothing and imports only torch.
"""

from .append_kv import append_kv
from .attention_mask import attention_mask
from .extract_kv import extract_kv
from .insert_kv import insert_kv
from .likeliest import likeliest
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
    "likeliest",
    "linear",
    "masked_softmax",
    "merge_attention",
    "move_kv",
    "ragged_attention",
    "rms_norm",
    "silu_and_mul",
]
