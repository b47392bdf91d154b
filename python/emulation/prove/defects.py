"""Kernels that are wrong on purpose, which the prover has to refute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from baton_kernels.testing import int32
from emulation.prove.attention import leaves
from emulation.prove.claims import BATCH, HIDDEN, OUTSIDE, PAGES, Claim, Prover, look_at_reads
from emulation.ptx.machine import compile_ptx
from emulation.ptx.symbolic import SymbolicMachine

SOURCE = Path(__file__).with_suffix(".cu")
# Defect -> the statements that it breaks, in the order of `Defect` in defects.cu.
IN_SLOTS = {
    "right": (),
    "masks by multiplying with zero": (HIDDEN, OUTSIDE),
    "splits by the number of rows": (BATCH,),
    "reads its tail and throws it away": (OUTSIDE,),
}
# The same of `PagedDefect`.
IN_PAGES = {
    "right, in pages": (),
    "multiplies another's page with zero": (HIDDEN, OUTSIDE),
    "splits by the size of pages": (PAGES,),
}
DEFECTS = IN_SLOTS | IN_PAGES
CAPACITY = 12


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call: its rows, and where their columns lie."""

    tags: str
    lengths: Sequence[int]
    cache: tuple[int, int]  # slots and their columns, or pages
    place: Callable[[int, int], tuple[int, int]]  # of a row's key in the cache
    indices: Sequence[torch.Tensor]
    numbers: Sequence[int]


def in_slots(tags: str, starts: Sequence[int], lengths: Sequence[int]) -> Launch:
    return Launch(
        tags, lengths, (len(tags), CAPACITY), lambda row, key: (row, starts[row] + key),
        (int32(starts), int32(lengths)), (CAPACITY,),
    )  # fmt: skip


def in_pages(
    tags: str, lengths: Sequence[int], page: int, table: Sequence[Sequence[int]]
) -> Launch:
    """A row's last entry is a page of another row, or of none."""
    num_pages = 1 + max(max(row) for row in table)
    return Launch(
        tags, lengths, (num_pages, page), lambda row, key: (table[row][key // page], key % page),
        (torch.tensor(table, dtype=torch.int32), int32(lengths)), (page, len(table[0])),
    )  # fmt: skip


# Row A by itself, then elsewhere and below another row.
SLOTS = in_slots("A", [1], [6]), in_slots("BA", [0, 3], [4, 6])
PAGES_OF_ROWS = (
    in_pages("A", [6], 3, [[1, 0, 2]]), in_pages("BA", [4, 6], 2, [[6, 4, 0, 1], [5, 2, 3, 4]]),
)  # fmt: skip


def examine(defect: str, architecture: int = 80) -> list[Claim]:
    """The statements of one kernel, of two calls that have row A in common."""
    prover = Prover(architecture)
    ops, table = prover.ops, prover.terms
    paged = defect in IN_PAGES
    statements = (HIDDEN, OUTSIDE, PAGES if paged else BATCH)
    claims = [prover.claim(defect, statement, "6 keys") for statement in statements]
    name = "attend_pages" if paged else "attend"
    number = list(IN_PAGES if paged else IN_SLOTS).index(defect)
    machine = SymbolicMachine(
        compile_ptx(SOURCE, architecture), f"{name}_kernelILi{number}E", table
    )
    alone = None
    for launch in PAGES_OF_ROWS if paged else SLOTS:
        ops.forget()
        machine.shadow = ops.shadow
        tags = launch.tags
        query, out = torch.zeros(len(tags), 4), torch.zeros(len(tags), 4)
        cache = [torch.zeros(*launch.cache, 4) for _ in range(2)]
        owner = {
            launch.place(row, key): (tag, key)
            for row, (tag, length) in enumerate(zip(tags, launch.lengths, strict=True))
            for key in range(length)
        }

        def name_cache(tensor: str, owner=owner):
            def name(*index: int):
                if index[:2] in owner:
                    tag, key = owner[index[:2]]
                    return (tensor, tag, key, index[2]), ("token", tag)
                return (f"{tensor}'s padding", *index), "padding"

            return name

        leaves(
            ops, query, "query",
            lambda row, dim, tags=tags: (("query", tags[row], dim), ("token", tags[row])),
        )  # fmt: skip
        for tensor, x in zip(("key", "value"), cache, strict=True):
            leaves(ops, x, tensor, name_cache(tensor))
        given = [query, *cache, out, *launch.indices]
        arguments = [np.array(x.data_ptr(), np.uint64).tobytes() for x in given]
        arguments += [np.array(number, np.int32).tobytes() for number in launch.numbers]
        machine.launch((len(tags), 1, 1), (4, 1, 1), arguments, given)
        terms = ops.terms_of(out)[tags.index("A")].reshape(-1).tolist()
        allowed = table.class_bits([("token", "A")])
        strange = [term for term in terms if table.reach[term] & ~allowed]
        claims[0].check(not strange, prover.influence(strange, allowed, f"rows {tags}"))
        look_at_reads(prover, claims[1])
        alone = alone or terms
        pair = next(((a, b) for a, b in zip(alone, terms, strict=True) if a != b), None)
        claims[2].check(pair is None, prover.difference(*pair) if pair else "")
    return claims
