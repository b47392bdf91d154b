"""All kernels that read the cache, and the grids on which they are proved."""

from __future__ import annotations

import dataclasses

import torch

from emulation.prove.attention import Call
from emulation.prove.claims import CUT, Claim, Prover
from emulation.prove.copies import (
    WIDTHS,
    prove_append,
    prove_extract,
    prove_insert,
    prove_merge,
    prove_move,
)
from emulation.prove.grids import Grid, prove

# What has to be refuted: a lone token is the decode kernel's, whose products have other shapes; and
# a value that is not finite is weighed apart in tiles at the border of what is visible alone.
KNOWN = {("prefill and decode", CUT), ("prefill of whole tiles", CUT)}
OPTIONS = (
    {}, {"window": 3}, {"softcap": 5.0, "alibi": True, "sinks": True},
    {"causal": False, "window": 20},
)  # fmt: skip


def is_expected(claim: Claim) -> bool:
    """Whether a statement is proved, or refuted if it has to be."""
    known = (claim.kernel.partition(",")[0], claim.statement) in KNOWN
    return bool(claim.checks) and bool(claim.evidence) == known


def attention_grids(dtype: torch.dtype, quick: bool) -> list[Grid]:
    """float32 has the generic kernel, the others those of the tensor cores."""
    name = str(dtype).removeprefix("torch.")
    base = Call((), dtype=dtype)
    options = OPTIONS[:3:2] if quick else OPTIONS
    cut = ((9, 9), (9, 4), (7, 7)) if quick else ((20, 20), (20, 5), (15, 15), (17, 9))
    alone = () if quick else ((17, 1),)
    # Tokens 65 to 69 share a tile of 16 vectors with earlier ones, or not.
    whole = ((70, 8), (70, 5))
    if dtype is torch.float32:
        lengths, queries = ((5,), (1, 2)) if quick else ((1, 2, 5, 17, 33), (1, 2, 5))
        some = options[1:] if quick else options
        grids = [Grid("generic", base, lengths, queries, some, cut + alone)]
        if not quick:
            grids.append(Grid("generic, split", base, (514,), (1,)))
            grids.append(Grid("generic, 80 dims", Call((), dtype=dtype, head_dim=80), (9,), (1, 3)))
        return grids
    if quick:
        return [
            Grid(f"decode, {name}", base, (5,), (1,), options),
            Grid(f"decode of 2 tokens, {name}", base, (5,), (2,)),
            # Of one dtype: the others' kernels are the same, of other instructions.
            *([Grid(f"prefill, {name}", base, (9,), (9,), ({},), cut)] * (dtype is torch.bfloat16)),
            Grid(f"prefill and decode, {name}", base, (), (), ({},), ((5, 2), (5, 1))),
        ]
    return [
        Grid(f"decode, {name}", base, (*range(1, 19), 33, 70), (1,), options),
        *(
            Grid(
                f"decode, {name}, {head_dim} dims",
                Call((), dtype=dtype, head_dim=head_dim, heads=heads),
                (17,), (1,), options,
            )
            for head_dim, heads in ((64, (12, 1)), (80, (2, 1)), (96, (2, 1)), (128, (2, 1)),
                                    (256, (2, 1)))
        ),
        Grid(f"decode of 2 tokens, {name}", base, (2, 5, 18), (2,), options, ((5, 2), (6, 2))),
        Grid(f"prefill, {name}", base, (9, 18, 70), (9,), options, cut),
        Grid(f"prefill and decode, {name}", base, (), (), ({},), (*cut, *alone)),
        Grid(f"prefill of whole tiles, {name}", base, (), (), ({},), whole),
        Grid(f"prefill of whole tiles with finite values, {name}",
             dataclasses.replace(base, finite=True), (), (), ({},), whole),
        Grid(f"split and merge, {name}", base, (514,), (1,)),
    ]  # fmt: skip


def prove_all(prover: Prover, quick: bool) -> Prover:
    """Every kernel on every grid; `quick` takes one dtype per architecture and few lengths."""
    new = prover.architecture >= 80
    lengths, starts = ([3, 0, 2], [2, 1, 0]) if quick else ([3, 1, 0, 20], [2, 0, 1, 4])
    companies = ("A", "BA") if quick else ("A", "BA", "CABD", "BCDEFGHA")
    widths = WIDTHS[1:2] if quick else WIDTHS
    moves = [(0, 2, 0, 5, 7), (1, 0, 2, 3, 4)]
    # The copies have the same PTX on both architectures, where nothing is converted.
    if new or not quick:
        prove_insert(prover, lengths, starts, widths)
        prove_extract(prover, lengths, starts, widths)
        prove_move(prover, moves, widths)
        prove_append(prover, companies, widths)
        prove_merge(prover, companies, widths)
    # bfloat16 before sm_80 is multiplied by shuffles and single operations: no rule says that a
    # weight of 0 adds nothing there, and this machine takes long.
    dtypes = [torch.float16, torch.float32] + ([torch.bfloat16] if new else [])
    for dtype in ([torch.bfloat16, torch.float32] if new else [torch.float16]) if quick else dtypes:
        prove(prover, attention_grids(dtype, quick))
    return prover
