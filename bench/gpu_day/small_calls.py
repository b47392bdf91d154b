"""Small calls of every op with a CUDA kernel: compared with the reference, or run by a tool.

`python -m bench.gpu_day.small_calls --device cuda` runs them without a comparison, in memory of
exactly the needed size: this is what compute-sanitizer needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import Accuracy, assert_same_bits, cumulative, int32

SLOTS, KV_HEADS, CAPACITY = 3, 2, 700
ROWS = ([0, 2], [5, 0], [37, 530])  # slots, starts, lengths


def caches(device: str, dtype: torch.dtype, dim: int, layers: tuple[int, ...] = ()) -> list:
    """Keys and values of the rows; their padding is never written."""
    made = []
    for _ in range(2):
        cache = torch.empty(*layers, SLOTS, KV_HEADS, CAPACITY, dim, dtype=dtype, device=device)
        for slot, start, length in zip(*ROWS, strict=True):
            cache[..., slot, :, start : start + length, :].normal_()
        made.append(cache)
    return made


def attention(device: str, dtype: torch.dtype, dim: int, tokens: list[int], **options) -> tuple:
    """A call of ragged_attention: the op's name and its arguments."""
    query = torch.empty(sum(tokens), 4, dim, dtype=dtype, device=device).normal_()
    index = (int32(x, device) for x in ROWS)
    arguments = (query, *caches(device, dtype, dim), cumulative(tokens, device), *index)
    return "ragged_attention", arguments, options


def paged(device: str, page: int, tokens: list[int]) -> tuple:
    """A call of ragged_attention in bfloat16 x 128 with a block table; no page is shared."""
    query = torch.empty(sum(tokens), 4, 128, dtype=torch.bfloat16, device=device).normal_()
    starts, lengths = ROWS[1:]
    pages_of = [-(-(start + n) // page) for start, n in zip(starts, lengths, strict=True)]
    table = torch.full((len(lengths), max(pages_of)), -1, dtype=torch.int32)
    free = torch.randperm(sum(pages_of), dtype=torch.int32)
    for row, count in enumerate(pages_of):
        table[row, :count], free = free[:count], free[count:]
    shape = (sum(pages_of), KV_HEADS, page, 128)
    caches = [torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)]
    index = (int32(x, device) for x in (starts, lengths))
    arguments = (query, *caches, cumulative(tokens, device), None, *index)
    return "ragged_attention", arguments, {"block_table": table.to(device)}


def calls(device: str) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """Names, and functions that make an op's name, arguments and keyword arguments."""
    half, wide = torch.bfloat16, torch.float32

    def packed(count: int, dtype: torch.dtype, *layers: int) -> list[torch.Tensor]:
        shape = (*layers, count, KV_HEADS, 64)
        return [torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2)]

    def places(*lists: list[int]) -> list[torch.Tensor]:
        return [int32(values, device) for values in lists]

    yield "decode bf16 x 128", lambda: attention(device, half, 128, [1, 1])
    yield (
        "decode bf16 x 64, bounds",
        lambda: attention(device, half, 64, [1, 1], max_query_length=1, max_length=530),
    )
    yield (
        "decode float16 x 128, window",
        lambda: attention(device, torch.float16, 128, [1, 1], window=100),
    )
    yield "decode float32 x 64", lambda: attention(device, wide, 64, [1, 1])
    yield "decode bf16 x 24", lambda: attention(device, half, 24, [1, 1], softcap=20.0)
    yield "prefill bf16 x 128", lambda: attention(device, half, 128, [37, 200])
    yield (
        "prefill bf16 x 64, not causal",
        lambda: attention(device, half, 64, [9, 70], causal=False, return_lse=True),
    )
    yield "mixed bf16 x 128", lambda: attention(device, half, 128, [1, 150])
    yield "decode in pages of 16", lambda: paged(device, 16, [1, 1])
    yield "decode in pages of 7", lambda: paged(device, 7, [1, 1])
    yield "prefill in pages of 16", lambda: paged(device, 16, [37, 200])
    yield "insert_kv", lambda: (
        "insert_kv", (*packed(9, half), *caches(device, half, 64),
                      *places([0, 4, 9], [0, 2], [50, 600])), {},
    )  # fmt: skip
    yield "insert_kv of 2 layers, zero_padding", lambda: (
        "insert_kv", (*packed(9, half, 2), *caches(device, half, 64, (2,)),
                      *places([0, 4, 9], [0, 2], [50, 600])), {"zero_padding": True},
    )  # fmt: skip
    yield "extract_kv", lambda: (
        "extract_kv", (*caches(device, half, 64), *places([0, 30, 430], [0, 2], [5, 100])),
        {"total_tokens": 430},
    )  # fmt: skip
    yield "move_kv over itself", lambda: (
        "move_kv", (*caches(device, half, 64), *places([2], [0], [2], [3], [520])), {},
    )  # fmt: skip
    yield "append_kv with rotary", lambda: (
        "append_kv",
        (*packed(2, half), *caches(device, half, 64), *places([0, 2], [42, 530])),
        {
            "query": torch.empty(2, 4, 64, dtype=half, device=device).normal_(),
            "cos": torch.rand(2, 32, device=device), "sin": torch.rand(2, 32, device=device),
        },
    )  # fmt: skip

    def halves() -> tuple:
        sides = []
        for _ in range(2):
            sides.append(torch.empty(40, 4, 128, dtype=half, device=device).normal_())
            sides.append(torch.empty(40, 4, device=device).normal_())
        return "merge_attention", tuple(sides), {}

    yield "merge_attention", halves


def compare(op: str, arguments: tuple, options: dict) -> None:
    """Compares the op on its device with the reference on the CPU.

    Raises:
        AssertionError: a result is wrong, or a cache has different bits.
    """
    here = [x if x is None else x.cpu().clone() for x in arguments]
    given = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    result = getattr(baton_kernels, op)(*arguments, **options)
    if op in ("ragged_attention", "merge_attention"):
        results = result if isinstance(result, tuple) else (result,)
        Accuracy(op, *here, **given).check(tuple(x.cpu() for x in results))
        return
    expected = getattr(reference, op)(*here, **given)
    written = list(arguments) if op != "extract_kv" else list(result)
    wanted = here if op != "extract_kv" else list(expected)
    if op == "append_kv":
        # Rotation rounds: appended keys are compared with a tolerance like the query, the rest bit
        # by bit.
        slots, columns = (x.tolist() for x in here[4:6])
        keys = [(slot, slice(None), column) for slot, column in zip(slots, columns, strict=True)]
        pairs = [(result.cpu(), expected)]
        pairs += [(written[2][at].cpu(), wanted[2][at]) for at in keys]
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        for at in keys:
            written[2][at] = wanted[2][at].to(written[2].device)
    for got, want in zip(written, wanted, strict=True):
        assert_same_bits(got.cpu(), want, op)


@torch.inference_mode()
def main() -> int:
    """Entry point."""
    device = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cuda"
    for name, make in calls(device):
        op, arguments, options = make()
        getattr(baton_kernels, op)(*arguments, **options)
        print(name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
