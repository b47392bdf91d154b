"""Calls whose types a type checker must get right; `make lint` checks this file, nothing runs
it."""

import torch
from typing_extensions import assert_type

from baton_kernels import append_kv, ragged_attention, rms_norm
from baton_kernels.torch_ops import ops

Pair = tuple[torch.Tensor, torch.Tensor]


def attention(x: torch.Tensor, index: torch.Tensor, wants_lse: bool) -> None:
    """Only a call that may return the lse returns a pair."""
    assert_type(ragged_attention(x, x, x, index, index, index, index), torch.Tensor)
    assert_type(ragged_attention(x, x, x, index, index, index, index, return_lse=True), Pair)
    either = ragged_attention(x, x, x, index, index, index, index, return_lse=wants_lse)
    assert_type(either, torch.Tensor | Pair)


def norm(x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """With a residual the sum comes back too."""
    assert_type(rms_norm(x, x), torch.Tensor)
    assert_type(rms_norm(x, x, residual=x), Pair)
    assert_type(rms_norm(x, x, residual=residual), torch.Tensor | Pair)


def append(x: torch.Tensor, index: torch.Tensor, query: torch.Tensor | None) -> None:
    """The rotated query is returned if there is one."""
    append_kv(x, x, x, x, index, index)
    assert_type(append_kv(x, x, x, x, index, index, query=x), torch.Tensor)
    assert_type(append_kv(x, x, x, x, index, index, query=query), torch.Tensor | None)


def without_python_functions(x: torch.Tensor, index: torch.Tensor) -> None:
    """The ops as torch registers them, typed by the protocols of their schemas."""
    assert_type(ops.ragged_attention(x, x, x, None, None, None, index), torch.Tensor)
    assert_type(ops.ragged_attention.lse(x, x, x, None, None, None, index, 0.5), Pair)
    ops.ragged_attention.lse_out(x, x, x, None, None, None, index, out=x, lse=x)
