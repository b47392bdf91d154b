"""Rotary cos and sin of packed tokens, in float32, as the model's own rotary module computes them.

Every frequency and scaling factor comes from that module, so only one implementation computes what
a config can specify. What is added here: the values are kept in a table indexed by position, and
with `dynamic` RoPE, whose frequencies depend on the length of the query, each query gets the
frequencies it would get if it were decoded by itself.
"""

from __future__ import annotations

import copy

import torch

from .packed_batch import PackedBatch
from .structure import Rotary

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

# Positions by which the table grows. The blocks are always the same, so that a position has the
# same bits however the table was built. Blocks for dynamic RoPE are shorter, because each of their
# rows needs one call of the module.
_BLOCK = 1024
_DYNAMIC_BLOCK = 64


class RotaryTable:
    """cos and sin by position, from a private copy of a Llama model's rotary module.

    `cos[i] = scaling * cos(positions[i] * frequencies)`, sin likewise, half a head wide. With
    dynamic RoPE, a query that is longer than the trained length has the frequencies for its length
    in this pass. The module does the same when the query is prefilled whole and then decoded token
    by token, with no other query before it or at the same time.

    Args:
        rotary: the model's rotary module (`model.model.rotary_emb`); not kept and not changed.
        head_dim: int; the module must rotate the whole head.

    Raises:
        NotImplementedError: the RoPE type is not one of `SUPPORTED_ROPE_TYPES`, or rotates only
            part of the head.
    """

    def __init__(self, rotary: Rotary, head_dim: int) -> None:
        rope_type = rotary.rope_type
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise NotImplementedError(
                f"patch_llama: rope_type must be one of {', '.join(SUPPORTED_ROPE_TYPES)}, "
                f"got {rope_type!r}"
            )
        if 2 * rotary.inv_freq.numel() != head_dim:
            raise NotImplementedError(
                f"patch_llama: the rotary embedding must rotate the whole head ({head_dim}), "
                f"got {2 * rotary.inv_freq.numel()} of its dimensions"
            )
        # Under dynamic RoPE the module keeps state between calls, so the model's own module must
        # not see these calls.
        self._rotary = copy.deepcopy(rotary)
        # Only its dtype and device matter: float32 keeps the module from rounding to the model's
        # dtype.
        self._like = torch.empty(0, dtype=torch.float32, device=rotary.inv_freq.device)
        self._half = head_dim // 2
        self.dynamic = rope_type == "dynamic"
        self._block = _DYNAMIC_BLOCK if self.dynamic else _BLOCK
        self._cos = self._like.new_empty(0, self._half)
        self._sin = self._like.new_empty(0, self._half)

    def __call__(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every packed token, float32 `[total_tokens, head_dim / 2]`.

        Args:
            batch: PackedBatch on the module's device.
        """
        if batch.max_length > len(self._cos):
            self._grow(batch.max_length)
        cos = self._cos.index_select(0, batch.positions)
        sin = self._sin.index_select(0, batch.positions)
        if self.dynamic and batch.max_length > self._rotary.original_max_seq_len:
            self._replace_long_prefills(batch, cos, sin)
        return cos, sin

    def addresses(self, longest: int) -> tuple[int, ...]:
        """Size and addresses of the table, after extending it to all positions of a query of
        `longest` tokens."""
        if longest > len(self._cos):
            self._grow(longest)
        return len(self._cos), self._cos.data_ptr(), self._sin.data_ptr()

    def _replace_long_prefills(
        self, batch: PackedBatch, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """Row p of the table is for a token that is the last of its query, as in decoding. In a
        pass with several tokens per query, all of them use the frequencies for the length at its
        end."""
        begin = 0
        for count, length, padding in zip(
            batch.query_lengths, batch.total_lengths, batch.padding, strict=True
        ):
            end = begin + count
            if count > 1 and length > self._rotary.original_max_seq_len:
                cos[begin:end], sin[begin:end] = self._alone(length - count, length)
            begin = end + padding

    def _grow(self, length: int) -> None:
        blocks = [(self._cos, self._sin)]
        fill = self._dynamic_block if self.dynamic else self._alone
        for begin in range(len(self._cos), length, self._block):
            blocks.append(fill(begin, begin + self._block))
        self._cos, self._sin = (torch.cat(parts) for parts in zip(*blocks, strict=True))

    def _dynamic_block(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self._alone(position, position + 1) for position in range(begin, end)]
        cos, sin = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return cos, sin

    def _alone(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions [begin, end) of a query of length `end`, computed by the module
        in the state that it has before its first query."""
        rotary = self._rotary
        if self.dynamic:
            rotary.inv_freq = rotary.original_inv_freq
            rotary.max_seq_len_cached = rotary.original_max_seq_len
        positions = torch.arange(begin, end, device=self._like.device)
        cos, sin = rotary(self._like, positions[None])
        # Both halves of a head have the same angles.
        return cos[0, :, : self._half], sin[0, :, : self._half]
