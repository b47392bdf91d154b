"""Errors that `make coverage` found untested: no heads, no width, booleans, wrong names."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import baton_kernels
from baton_kernels.ops.checks import default_cu_seqlens, default_slots, default_starts
from baton_kernels.ops.linear_packed import unpack
from baton_kernels.ops.ragged_attention import check_arguments

NO_HEADS = torch.ones(2, 0, 8, 16)
CACHE = torch.ones(2, 1, 8, 16)
ONE = torch.ones(1, dtype=torch.int32)
CASES = {
    "rms_norm: x must be at least 1 wide, got [2, 0]": lambda: baton_kernels.rms_norm(
        torch.ones(2, 0), torch.ones(0), 1e-6
    ),
    "insert_kv: num_kv_heads must be at least 1, got 0": lambda: baton_kernels.insert_kv(
        torch.ones(1, 0, 16), torch.ones(1, 0, 16), NO_HEADS, NO_HEADS.clone()
    ),
    "ragged_attention: num_kv_heads must be at least 1, got 0": (
        lambda: baton_kernels.ragged_attention(
            torch.ones(1, 4, 16), NO_HEADS, NO_HEADS.clone(), None, None, None, ONE
        )
    ),
    "rms_norm: x must be float32, float16 or bfloat16, got bool": lambda: baton_kernels.rms_norm(
        torch.ones(2, 3, dtype=torch.bool), torch.ones(3), 1e-6
    ),
    "extract_kv: cu_seqlens must be int32, got bool": lambda: baton_kernels.extract_kv(
        CACHE, CACHE.clone(), torch.tensor([False, True]), None, None, total_tokens=1
    ),
    "set_cpu_isa: name must be": lambda: torch.ops.baton_kernels.set_cpu_isa("mmx", False),
}


@pytest.mark.parametrize("message", CASES)
def test_is_refused(message):
    before = torch.ops.baton_kernels.cpu_isas()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        CASES[message]()
    assert torch.ops.baton_kernels.cpu_isas() == before


BYTES, SCALE = torch.ones(2, 1, 8, 16, dtype=torch.int8), torch.ones(2, 1, 8)
HALVES = (torch.ones(2, 1, 16, dtype=torch.float16), torch.ones(2, 1, 16, dtype=torch.float16))


def extract_bytes(**changes):
    given = {
        "cu_seqlens": torch.tensor([0, 2], dtype=torch.int32), "slots": ONE, "starts": None,
        "total_tokens": 2, "key_scale": SCALE, "value_scale": SCALE, **changes,
    }  # fmt: skip
    return baton_kernels.extract_kv(BYTES, BYTES.clone(), **given)


def on_cuda(op, *shapes):
    """A call whose tensors claim to be on a GPU; there need not be one."""
    with FakeTensorMode():
        query, cache, scale, one = (
            torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes
        )
        return op(query, cache, cache, None, None, None, one, key_scale=scale, value_scale=scale)


EIGHT_BIT = (
    ((1, 4, 16), torch.float16), (BYTES.shape, torch.int8), (SCALE.shape, torch.float32),
    ((1,), torch.int32),
)  # fmt: skip
MORE = {
    "extract_kv: out[0] must be float32 as dtype, got float16": lambda: extract_bytes(
        dtype=torch.float32, out=HALVES
    ),
    "extract_kv: slots must be int32, got int64": lambda: extract_bytes(slots=ONE.long()),
    "pack_linear: weight must be on the cpu for int8, got meta": lambda: baton_kernels.pack_linear(
        torch.ones(8, 4, device="meta"), dtype=torch.int8
    ),
    "pack_linear: 2305843009213693952 bytes for panels could not be reserved": (
        lambda: baton_kernels.PanelMemory(2**61)
    ),
    "unpack_linear: in_features must be": lambda: unpack(torch.ones(1, 4, 48), 8, -1),
    "must be of float32, float16 or bfloat16 (eight bits need the CPU's kernels)": lambda: on_cuda(
        baton_kernels.ragged_attention, *EIGHT_BIT
    ),
    "ragged_attention: key_scale must be None with the Triton kernels": lambda: check_arguments(
        torch.ones(1, 4, 16), BYTES, BYTES, None, None, None, ONE, key_scale=SCALE,
        value_scale=SCALE, in_triton=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MORE)
def test_is_refused_too(message):
    kinds = ValueError, TypeError, NotImplementedError, MemoryError
    with pytest.raises(kinds, match=re.escape(message)):
        MORE[message]()


def test_a_weight_that_is_not_packed_is_read_as_it_is():
    """A weight on another device is not packed: only the CPU's kernels do that."""
    weight = baton_kernels.pack_linear(torch.ones(8, 4, device="meta"))
    assert not weight.is_packed
    assert weight.rows(torch.tensor([1, 7], device="meta")).shape == (2, 4)


def test_memory_of_no_panels_is_given_back():
    memory = baton_kernels.PanelMemory(64)
    memory.release(memory.take((0, 4, 48), torch.float32))


def test_index_arguments_that_are_left_out():
    """As Triton's kernels get them: one token per row, row i in slot i, from column 0 on."""
    cpu = torch.device("cpu")
    assert default_cu_seqlens(None, 3, cpu).tolist() == [0, 1, 2, 3]
    assert default_slots(None, 3, cpu).tolist() == [0, 1, 2]
    assert default_starts(None, 3, cpu).tolist() == [0, 0, 0]
    assert default_slots(ONE, 1, cpu) is ONE
