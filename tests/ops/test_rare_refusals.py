"""Errors that `make coverage` found untested: no heads, no width, booleans, wrong names."""

import re

import pytest
import torch

import baton_kernels

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
