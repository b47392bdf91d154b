"""Tensors past 2**31 elements: the same bits as small ones give.

They lie in a sparse file and have strides that leave most of it untouched, so that a few pages of
memory hold them.
"""

import contextlib

import pytest
import torch

import baton_kernels
from baton_kernels.testing import assert_same_bits, cumulative, int32
from emulation.cuda.backends import EMULATED

LAYERS, SLOTS, HEADS, CAPACITY, HEAD_DIM = 2, 4, 4, 8, 64
SIZES = {"layers": LAYERS, "slots": SLOTS, "heads": HEADS, "columns": CAPACITY}
BACKENDS = {"cpu": baton_kernels, **EMULATED}


def spread(folder, sizes, far, dtype):
    """Zeros of these sizes; only the dimension `far` is spread over more than 2**31 elements."""
    steps, near = [], 1
    for n in reversed(sizes):
        steps.insert(0, near)
        near *= n
    # The last index starts past 2**31; 64 elements keep rows at multiples of 16 bytes.
    steps[far] = (2**31 // (sizes[far] - 1) // 64 + 1) * 64 + near
    last = sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    assert (sizes[far] - 1) * steps[far] > 2**31
    path = folder / str(len(list(folder.iterdir())))
    flat = torch.from_file(str(path), shared=True, size=last + 1, dtype=dtype)
    return flat.as_strided(sizes, steps)


def numbers(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def use(ops, keys, values, key, value, query):
    """Calls every op on caches with layers; returns everything that was read back."""
    bounds, slots, starts = cumulative([5, 3]), int32([3, 1]), int32([2, 4])
    ops.insert_kv(key, value, keys, values, bounds, slots, starts)
    ops.move_kv(keys, values, *(int32(x) for x in ([3, 1], [2, 4], [3, 2], [3, 5], [5, 3])))
    rows = int32([3, 2]), int32([3, 5]), int32([5, 3])
    found = list(ops.extract_kv(keys, values, bounds, *rows[:2], total_tokens=8))
    for k, v in zip(keys, values, strict=True):
        # Decode and, with a group of four, rows of the prefill kernel.
        ops.append_kv(key[0, :2], value[0, :2], k, v, int32([0, 3]), int32([0, 2]))
        for index in (cumulative([1, 1]), cumulative([5, 3])):
            out = ops.ragged_attention(query[: index[-1]], k, v, index, *rows, return_lse=True)
            found += out
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", SIZES)
def test_caches_past_two_to_the_31_elements(backend, far, tmp_path):
    ops = BACKENDS[backend]
    sizes = (LAYERS, SLOTS, HEADS, CAPACITY, HEAD_DIM)
    packed = [numbers(LAYERS, 8, HEADS, HEAD_DIM), -numbers(LAYERS, 8, HEADS, HEAD_DIM)]
    query = numbers(8, 4 * HEADS, HEAD_DIM)
    small = [torch.zeros(sizes, dtype=torch.bfloat16) for _ in range(2)]
    large = [spread(tmp_path, sizes, list(SIZES).index(far), torch.bfloat16) for _ in range(2)]
    with getattr(ops, "entered", contextlib.nullcontext)():
        expected = use(ops, *small, *packed, query)
        actual = use(ops, *large, *packed, query)
    for got, want in zip([*large, *actual], [*small, *expected], strict=True):
        assert_same_bits(got.contiguous(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_packed_tensors_past_two_to_the_31_elements(backend, far, tmp_path):
    ops = BACKENDS[backend]
    sizes = (LAYERS, SLOTS, HEADS, CAPACITY, HEAD_DIM)
    small = [numbers(LAYERS, 8, HEADS, HEAD_DIM), -numbers(LAYERS, 8, HEADS, HEAD_DIM)]
    small.append(numbers(8, 4 * HEADS, HEAD_DIM))
    large = []
    for x in small:
        large.append(spread(tmp_path, x.shape, x.dim() - (3 if far == "tokens" else 2), x.dtype))
        large[-1].copy_(x)
    found = []
    with getattr(ops, "entered", contextlib.nullcontext)():
        for packed in (small, large):
            caches = [torch.zeros(sizes, dtype=torch.bfloat16) for _ in range(2)]
            found.append([*caches, *use(ops, *caches, *packed)])
    for want, got in zip(*found, strict=True):
        assert_same_bits(got, want)
