"""Kernels that are wrong on purpose, which the prover has to refute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from baton_kernels.testing import int32
from emulation.prove.attention import leaves
from emulation.prove.claims import BATCH, HIDDEN, OUTSIDE, Claim, Prover, look_at_reads
from emulation.ptx.machine import compile_ptx
from emulation.ptx.symbolic import SymbolicMachine

SOURCE = Path(__file__).with_suffix(".cu")
# In the order of `Defect` in defects.cu: what is wrong, and the statements that it breaks.
DEFECTS = {
    "right": (),
    "masks by multiplying with zero": (HIDDEN, OUTSIDE),
    "splits by the number of rows": (BATCH,),
    "reads its tail and throws it away": (OUTSIDE,),
}
CAPACITY = 12


def examine(defect: str, architecture: int = 80) -> list[Claim]:
    """The three statements of one kernel: row A alone, and below another row."""
    prover = Prover(architecture)
    ops, table = prover.ops, prover.terms
    claims = [prover.claim(defect, statement, "6 keys") for statement in (HIDDEN, OUTSIDE, BATCH)]
    kernel = f"attend_kernelILi{list(DEFECTS).index(defect)}E"
    machine = SymbolicMachine(compile_ptx(SOURCE, architecture), kernel, table)
    alone = None
    # Tags, starts and lengths of the rows.
    for tags, starts, lengths in (("A", [1], [6]), ("BA", [0, 3], [4, 6])):
        ops.forget()
        machine.shadow = ops.shadow
        query = torch.zeros(len(tags), 4)
        cache = [torch.zeros(len(tags), CAPACITY, 4) for _ in range(2)]
        out = torch.zeros(len(tags), 4)

        def name_cache(tensor: str, tags=tags, starts=starts, lengths=lengths):
            def name(row: int, column: int, dim: int):
                key = column - starts[row]
                if 0 <= key < lengths[row]:
                    return (tensor, tags[row], key, dim), ("token", tags[row])
                return (f"{tensor}'s padding", row, column, dim), "padding"

            return name

        leaves(
            ops, query, "query",
            lambda row, dim, tags=tags: (("query", tags[row], dim), ("token", tags[row])),
        )  # fmt: skip
        for tensor, x in zip(("key", "value"), cache, strict=True):
            leaves(ops, x, tensor, name_cache(tensor))
        given = [query, *cache, out, int32(starts), int32(lengths)]
        arguments = [np.array(x.data_ptr(), np.uint64).tobytes() for x in given]
        arguments.append(np.array(CAPACITY, np.int32).tobytes())
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
