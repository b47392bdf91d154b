"""Tokens that are numbers, and the keys and values that belong to them."""

import functools
from collections.abc import Sequence

import torch

from baton_kernels.reference._eight_bit import quantize

LAYERS, HEADS = 2, 2
# The number of different tokens; number n + DIFFERENT is n again.
DIFFERENT = 4096


def vectors(
    tokens: Sequence[int], head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[LAYERS, tokens, HEADS, head_dim]`` of these tokens."""
    index = torch.tensor(tokens, dtype=torch.int64) % DIFFERENT
    key, value = _vectors(head_dim, dtype)
    return key[:, index], value[:, index]


def quantized(tokens: Sequence[int], stored: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Elements and scales of the keys, and of the values, of these tokens in eight bits."""
    index = torch.tensor(tokens, dtype=torch.int64) % DIFFERENT
    return [
        (elements.view(torch.int8)[:, index].view(stored), scales[:, index])
        for elements, scales in _quantized(stored)
    ]


@functools.cache
def _vectors(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    number = torch.arange(DIFFERENT, dtype=torch.float64).view(1, -1, 1, 1)
    place = torch.arange(LAYERS * HEADS * head_dim).view(LAYERS, 1, HEADS, head_dim)
    angle = 1.0 + number * 0.37 + place * 1.91
    return angle.sin().to(dtype), angle.cos().to(dtype)


@functools.cache
def _quantized(stored: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [quantize(x, stored) for x in _vectors(16, torch.float32)]
