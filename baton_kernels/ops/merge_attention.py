"""merge_attention: combine two attentions over disjoint keys, exactly."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call

_native = ops.merge_attention.default


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combines two partial attentions of the same queries over disjoint sets of keys.

    ::

        lse = log(exp(lse_a) + exp(lse_b))
        out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

    A side whose lse is -inf saw nothing and is not read; two such sides give zeros and -inf.

    Args:
        out_a: `[total_queries, num_heads, head_dim]`, float32, float16 or bfloat16, last dimension
            contiguous.
        lse_a: `[total_queries, num_heads]`, float32, contiguous, natural logarithm.
        out_b: As out_a.
        lse_b: As lse_a.

    Returns:
        out and lse, shaped as out_a and lse_a, contiguous.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is not supported, or differs between out_a and out_b.

    Source: the merge of Flash-Decoding and of cascade attention in FlashInfer.
    """
    return call(
        "merge_attention", _native, check_arguments, out_a, lse_a, out_b, lse_b
    )  # fmt: skip


def check_arguments(out_a, lse_a, out_b, lse_b) -> None:
    check = Checker("merge_attention")
    check.floating("out_a", out_a)
    check.dtype_as("out_b", out_b, "out_a", out_a)
    check.dims("out_a", out_a, 3)
    check.shape("out_b", out_b, out_a.shape)
    check.last_contiguous("out_a", out_a)
    check.last_contiguous("out_b", out_b)
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b)):
        check.float32(name, tensor, out_a.device)
        check.shape(name, tensor, out_a.shape[:2])
        check.contiguous(name, tensor)


@torch.library.register_fake("baton_kernels::merge_attention")
def _fake(out_a, lse_a, out_b, lse_b):
    check_arguments(out_a, lse_a, out_b, lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
