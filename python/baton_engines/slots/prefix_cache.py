"""Keys and values of prompts and answers, kept for queries that begin with the same tokens.

A tree of blocks: each block holds the keys and values of some tokens that follow those of
its parent, so that a beginning which many texts share is held once. Blocks are found by the tokens
themselves, not by a hash of them. The least recently used block without a child goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

# Small enough that little of a shared beginning is lost at its end, and large enough that a block
# is copied as fast as memory allows.
BLOCK_TOKENS = 32


class KeysValues(NamedTuple):
    """Of a block: key and value `[num_layers, block_tokens, num_kv_heads, head_dim]`."""

    key: torch.Tensor
    value: torch.Tensor


class _Block:
    """A node of the tree; the root has no tokens, and neither keys nor values."""

    __slots__ = ("children", "content", "parent", "tokens")

    def __init__(self, parent: _Block | None, tokens: tuple[int, ...], content: KeysValues | None):
        self.parent = parent
        self.tokens = tokens
        self.content = content
        self.children: dict[tuple[int, ...], _Block] = {}


class PrefixCache:
    """Blocks of at most `max_bytes` together.

    Args:
        max_bytes: int, at least 1.
        block_tokens: of every block.

    Attributes:
        bytes_in_use: of the keys and values in all blocks; never more than `max_bytes`.
        version: int that changes whenever another beginning may be found than before.
    """

    def __init__(self, max_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.max_bytes = max_bytes
        self.block_tokens = block_tokens
        self.bytes_in_use = 0
        self.version = 0
        self._root = _Block(None, (), None)
        # Least recently used first. A block is never used without those before it, which come
        # later here, so the first one has no child.
        self._used: OrderedDict[_Block, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def find(self, tokens: Sequence[int], limit: int) -> int:
        """How many tokens, `limit` at most, at the beginning of `tokens` are held."""
        return self.block_tokens * sum(1 for _ in self._held(tokens, limit))

    def take(self, tokens: Sequence[int], limit: int) -> list[KeysValues]:
        """The blocks that `find` counts, which are used now."""
        blocks = list(self._held(tokens, limit))
        self._touch(blocks)
        return [block.content for block in blocks if block.content is not None]

    def keep(self, tokens: Sequence[int], read: Callable[[int, int], KeysValues]) -> None:
        """Hold the beginning of `tokens` as far as whole blocks and memory go.

        Args:
            tokens: those of a text whose keys and values are all known.
            read: copies the keys and values of the tokens from one index to another; called for
                blocks that are not held yet. If it raises, what was held before it still is.
        """
        blocks = list(self._held(tokens, len(tokens)))
        self._touch(blocks)
        parent = blocks[-1] if blocks else self._root
        size = self.block_tokens
        try:
            for begin in range(size * len(blocks), len(tokens) - size + 1, size):
                own = tuple(tokens[begin : begin + size])
                content = read(begin, begin + size)
                if not self._make_room(content, blocks):
                    break
                parent.children[own] = parent = _Block(parent, own, content)
                blocks.append(parent)
                self._used[parent] = None
                self.bytes_in_use += _num_bytes(content)
                self.version += 1
        finally:
            self._touch(blocks)

    def _held(self, tokens: Sequence[int], limit: int) -> Iterator[_Block]:
        block, size = self._root, self.block_tokens
        for begin in range(0, min(limit, len(tokens)) - size + 1, size):
            child = block.children.get(tuple(tokens[begin : begin + size]))
            if child is None:
                return
            yield child
            block = child

    def _touch(self, blocks: Sequence[_Block]) -> None:
        for block in reversed(blocks):
            self._used.move_to_end(block)

    def _make_room(self, content: KeysValues, kept: Sequence[_Block]) -> bool:
        """Drop blocks until the content fits; whether it does without dropping any of `kept`."""
        if _num_bytes(content) > self.max_bytes:
            return False
        while self.bytes_in_use + _num_bytes(content) > self.max_bytes:
            oldest = next(iter(self._used))
            if oldest in kept:
                return False
            self._drop(oldest)
        return True

    def _drop(self, block: _Block) -> None:
        del self._used[block]
        if block.parent is not None:
            del block.parent.children[block.tokens]
        if block.content is not None:
            self.bytes_in_use -= _num_bytes(block.content)
        self.version += 1


def _num_bytes(content: KeysValues) -> int:
    return content.key.nbytes + content.value.nbytes
