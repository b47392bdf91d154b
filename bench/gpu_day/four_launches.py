"""The launches to profile: a decode of 32 rows, one of a long row, a prefill, an insertion."""

from __future__ import annotations

import sys

import torch

from baton_kernels import insert_kv, ragged_attention
from baton_kernels.testing import cumulative, int32

HEADS, KV_HEADS, DIM = 32, 8, 128


def attend(device: str, dtype: torch.dtype, tokens: list[int], lengths: list[int]) -> None:
    like = {"device": device, "dtype": dtype}
    caches = [torch.randn(len(lengths), KV_HEADS, max(lengths), DIM, **like) for _ in range(2)]
    query = torch.randn(sum(tokens), HEADS, DIM, **like)
    rows = range(len(lengths))
    ragged_attention(
        query, *caches, cumulative(tokens, device), int32(rows, device),
        int32([0] * len(lengths), device), int32(lengths, device),
        max_query_length=max(tokens), max_length=max(lengths),
    )  # fmt: skip


@torch.inference_mode()
def main() -> int:
    """Entry point."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    dtype, k = (torch.bfloat16, 1024) if device == "cuda" else (torch.float32, 8)
    attend(device, dtype, [1] * 32, [2 * k] * 32)
    attend(device, dtype, [1], [32 * k])
    attend(device, dtype, [2 * k], [2 * k])
    like = {"device": device, "dtype": dtype}
    packed = [torch.randn(k, KV_HEADS, DIM, **like) for _ in range(2)]
    caches = [torch.zeros(4, KV_HEADS, 2 * k, DIM, **like) for _ in range(2)]
    places = (int32(x, device) for x in ([0, k], [2], [7]))
    insert_kv(*packed, *caches, *places)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
