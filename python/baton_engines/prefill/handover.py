"""Shared memory for a job: prompts go one way; keys, values and logits come back.

There is one anonymous file per job, mapped on both sides. It has no name, so it vanishes when both
processes have released it, however they end.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..llama.handle import ModelHandle

_ALIGNMENT = 64


class Sizes(NamedTuple):
    """The numbers on which the sizes of a job's tensors depend, besides the prompts' lengths."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelHandle) -> Sizes:
        """The sizes of a model."""
        sizes = (model.num_layers, model.num_kv_heads, model.head_dim, model.vocab_size)
        return cls(*sizes, model.dtype)


class Handover:
    """Views of a job's file, which stays mapped as long as one of them is used.

    Args:
        file: descriptor; not kept.
        sizes: of the model.
        lengths: of the prompts.
        create: whether the file is still empty.

    Attributes:
        tokens: int64 `[total_tokens]`.
        key, value: `[num_layers, total_tokens, num_kv_heads, head_dim]`.
        logits: float32 `[prompts, vocab]`.
    """

    tokens: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    logits: torch.Tensor

    def __init__(self, file: int, sizes: Sizes, lengths: Sequence[int], *, create: bool = False):
        total = sum(lengths)
        packed = (sizes.num_layers, total, sizes.num_kv_heads, sizes.head_dim)
        layout = {
            "tokens": ((total,), torch.int64),
            "key": (packed, sizes.dtype),
            "value": (packed, sizes.dtype),
            "logits": ((len(lengths), sizes.vocab_size), torch.float32),
        }
        offsets, end = {}, 0
        for name, (shape, dtype) in layout.items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if create:
            os.ftruncate(file, end)
        mapping = mmap.mmap(file, end)
        for name, (shape, dtype) in layout.items():
            flat = torch.frombuffer(
                mapping, dtype=dtype, count=math.prod(shape), offset=offsets[name]
            )
            setattr(self, name, flat.view(shape))
        self._lengths = list(lengths)

    def prompts(self) -> list[list[int]]:
        """The token ids of every prompt."""
        return [part.tolist() for part in self.tokens.split(self._lengths)]

    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Key and value of every prompt."""
        keys = self.key.split(self._lengths, dim=1)
        return list(zip(keys, self.value.split(self._lengths, dim=1), strict=True))
