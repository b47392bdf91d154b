"""Control flow: the instruction at which both sides of a branch meet again."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from emulation.ptx.instruction import Instruction


class Flow:
    """The graph of a kernel's instructions; ``len(code)`` stands for its end."""

    def __init__(self, code: Sequence[Instruction], labels: dict[str, int]) -> None:
        self.code, self.labels = code, labels
        ends = {at + 1 for at, x in enumerate(code) if x.name in ("bra", "ret", "exit")}
        self.starts = sorted({0, len(code)} | ends | set(labels.values()))
        self._block_of = {}
        for block, (first, after) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            self._block_of |= dict.fromkeys(range(first, after), block)
        self._block_of[len(code)] = len(self.starts) - 1

    def successors(self, at: int) -> list[int]:
        """The instructions that may follow one that ends a block."""
        x = self.code[at]
        if x.name == "bra":
            to = self.labels[x.operands[0]]
            return [at + 1, to] if x.guard else [to]
        if x.name in ("ret", "exit"):
            return [at + 1, len(self.code)] if x.guard else [len(self.code)]
        return [at + 1]

    def _of_block(self, block: int) -> list[int]:
        if block == len(self.starts) - 1:
            return []
        return [self._block_of[to] for to in self.successors(self.starts[block + 1] - 1)]

    @functools.cached_property
    def _after(self) -> list[int]:
        """Blocks that every way from a block to the end passes, itself included, as bits."""
        count = len(self.starts)
        after = [(1 << count) - 1] * (count - 1) + [1 << count - 1]
        following = [self._of_block(block) for block in range(count)]
        changed = True
        while changed:
            changed = False
            for block in reversed(range(count - 1)):
                common = -1
                for to in following[block]:
                    common &= after[to]
                common = common & (1 << count) - 1 | 1 << block
                if common != after[block]:
                    after[block], changed = common, True
        return after

    def meeting(self, at: int) -> int:
        """The first instruction that all ways from a branch pass."""
        block = self._block_of[at]
        passed = self._after[block]
        rest = passed & ~(1 << block)
        # The nearest one is passed by no way that does not pass all the others behind it.
        for other in range(len(self.starts)):
            if rest >> other & 1 and self._after[other] == rest:
                return self.starts[other]
        raise ValueError("a branch whose ways have no end")

    def barrier_before(self, at: int, meeting: int) -> str | None:
        """A barrier of the block, or an asynchronous copy, on a way from a branch."""
        seen, waiting = {self._block_of[meeting]}, self._of_block(self._block_of[at])
        while waiting:
            block = waiting.pop()
            if block in seen:
                continue
            seen.add(block)
            for x in self.code[self.starts[block] : self.starts[block + 1]]:
                if (x.name in ("bar", "barrier") and "warp" not in x.modifiers) or x.name == "cp":
                    return x.opcode
            waiting += self._of_block(block)
        return None
