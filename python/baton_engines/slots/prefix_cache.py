"""Keys and values of prompts and answers, kept for queries that begin with the same tokens.

A tree of blocks: each block holds the keys and values of some tokens that follow those of its
parent, so a beginning that many texts share is stored once. Blocks are found by the tokens
themselves, not by a hash of them. The least recently used block without a child is dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

# Small enough that little of a shared beginning is lost at its end, and large enough that copying a
# block reaches memory bandwidth.
BLOCK_TOKENS = 32


class KeysValues(NamedTuple):
    """Key and value of a block, `[num_layers, block_tokens, num_kv_heads, head_dim]`."""

    key: torch.Tensor
    value: torch.Tensor


class _Block:
    """A node of the tree; the root has neither tokens nor keys and values."""

    __slots__ = ("children", "content", "parent", "tokens")

    def __init__(self, parent: _Block | None, tokens: tuple[int, ...], content: KeysValues | None):
        self.parent = parent
        self.tokens = tokens
        self.content = content
        self.children: dict[tuple[int, ...], _Block] = {}


class PrefixCache:
    """Blocks of at most `max_bytes` in total.

    Args:
        max_bytes: int, at least 1.
        block_tokens: of every block.

    Attributes:
        bytes_in_use: bytes of the keys and values in all blocks; never more than `max_bytes`.
        version: int that changes whenever `find` may give another result than before.
    """

    def __init__(self, max_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.max_bytes = max_bytes
        self.block_tokens = block_tokens
        self.bytes_in_use = 0
        self.version = 0
        self._root = _Block(None, (), None)
        # Least recently used first. Whenever a block is used, so are its ancestors, which come
        # later here, so the first block has no child.
        self._used: OrderedDict[_Block, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def find(self, tokens: Sequence[int], limit: int) -> int:
        """How many tokens at the beginning of `tokens` are held, at most `limit`."""
        return self.block_tokens * sum(1 for _ in self._held(tokens, limit))

    def take(self, tokens: Sequence[int], limit: int) -> list[KeysValues]:
        """The blocks that `find` counts; they become the most recently used."""
        blocks = list(self._held(tokens, limit))
        self._touch(blocks)
        return [block.content for block in blocks if block.content is not None]

    def keep(self, tokens: Sequence[int], read: Callable[[int, int], KeysValues]) -> None:
        """Store the beginning of `tokens` as far as whole blocks and memory allow.

        Args:
            tokens: a text whose keys and values are all known.
            read: copies the keys and values of the tokens from one index to another; called for
                blocks that are not held yet. If it raises, the cache keeps what it held before.
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
        """Drop blocks until the content fits; returns whether that works without dropping
        `kept`."""
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
