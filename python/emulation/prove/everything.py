"""All kernels that read the cache, and the grids on which they are proved."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from emulation.artifacts import ROOT, hash_of
from emulation.prove.attention import Call
from emulation.prove.claims import CUT, Claim, Prover
from emulation.prove.copies import (
    WIDTHS,
    Queries,
    prove_append,
    prove_extract,
    prove_insert,
    prove_merge,
    prove_move,
)
from emulation.prove.grids import (
    ALL_PAGES,
    FEW_PAGES,
    FEW_SLOTS,
    PAGES_BY_32,
    SLOTS_BY_32,
    Grid,
    alone,
    between_others,
    by_32_vectors,
    in_crowd,
    in_pages_in_crowd,
    prove,
    with_idle_tokens,
)
from emulation.prove.runs import Unit
from emulation.static.kernels import PTX_ARCHITECTURES

# Statements that are expected to be refuted: a lone token runs in the decode kernel, whose products
# have other shapes; and a value that is not finite is weighed apart only in tiles at the border of
# what is visible.
KNOWN = {("prefill and decode", CUT), ("prefill of whole tiles", CUT)}
OPTIONS = (
    {}, {"window": 3}, {"softcap": 5.0, "alibi": True, "sinks": True},
    {"causal": False, "window": 20},
)  # fmt: skip
ALL_OPTIONS = (*OPTIONS, {"alibi": True, "return_lse": False}, {"sinks": True, "window": 1})
# Heads and head dims with a decode kernel each; 12 heads of a KV head take two column tiles.
DECODE_SHAPES = (
    ((2, 1), 64), ((12, 1), 64), ((2, 1), 80), ((12, 1), 80), ((2, 1), 96), ((12, 1), 96),
    ((2, 1), 128), ((12, 1), 128), ((2, 1), 256),
)  # fmt: skip
# (length, query tokens) whose positions are the same tokens'.
CUTS = ((20, 20), (20, 5), (15, 15), (17, 9))
# Tokens 65 to 69 share a tile of 16 vectors with earlier ones, or not.
WHOLE = ((70, 8), (70, 5))


def is_expected(claim: Claim) -> bool:
    """Whether a statement is proved, or refuted if it has to be."""
    known = (claim.kernel.partition(",")[0], claim.statement) in KNOWN
    return bool(claim.checks) and bool(claim.evidence) == known


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quick_grids(dtype: torch.dtype) -> list[Grid]:
    """The grids of the test: a few lengths."""
    name, base = name_of(dtype), Call((), dtype=dtype)
    cut = ((9, 9), (9, 4), (7, 7))
    if dtype is torch.float32:
        return [Grid("generic", base, (5,), (1, 2), OPTIONS[1:3], cut)]
    return [
        Grid(f"decode, {name}", base, (5,), (1,), OPTIONS[:3:2]),
        Grid(f"decode in pages, {name}", base, (19,), places=FEW_PAGES),
        # One dtype is enough: the others' kernels differ only in their instructions.
        *([Grid(f"prefill, {name}", base, (9,), (9,), ({},), cut)] * (dtype is torch.bfloat16)),
        Grid(f"prefill and decode, {name}", base, (), (), ({},), ((5, 2), (5, 1))),
    ]


def prove_quick(prover: Prover) -> Prover:
    """Every kernel on a few calls: one dtype per architecture, and few lengths."""
    new = prover.architecture >= 80
    queries, companies, widths = Queries.of([3, 0, 2], [2, 1, 0]), ("A", "BA"), WIDTHS[1:2]
    # The copies have the same PTX on both architectures, where nothing is converted.
    if new:
        prove_insert(prover, queries, widths)
        prove_extract(prover, queries, widths)
        prove_move(prover, MOVES, widths)
        prove_append(prover, companies, widths)
        prove_merge(prover, companies, widths)
    for dtype in [torch.bfloat16, torch.float32] if new else [torch.float16]:
        prove(prover, quick_grids(dtype))
    return prover


# Onto itself backwards and forwards, elsewhere, and from no slot.
MOVES = [(0, 2, 0, 5, 7), (1, 0, 2, 3, 4)]
ALL_MOVES = [*MOVES, (3, 9, 3, 1, 12), (4, 1, 4, 1, 3), (-1, 0, 1, 4, 2), (5, 0, 5, 70, 75)]
COMPANIES = ("A", "BA", "CABD", "BCDEFGHA")
# Rows enough for blocks that have all heads of one.
CROWD = ("A", "".join(chr(ord("B") + i) for i in range(65)) + "A")
ALL_WIDTHS = (*WIDTHS, (torch.float16, 64, 0))
QUERIES = {
    "some": Queries.of([3, 1, 0, 20], [2, 0, 1, 4], lost=[1]),
    "many": Queries.of([2, 1, 0] * 13, [1, 0, 2] * 13, lost=[20]),
    "long": Queries.of([150], [1]),
}


def copy_units() -> Iterator[Unit]:
    """The copies, append_kv and merge_attention."""
    calls: list[tuple[str, str, Callable[..., None], dict]] = []
    for name, queries in QUERIES.items():
        few = {} if name == "some" else {"widths": WIDTHS[1:2]}
        calls.append(("insert_kv", name, prove_insert, {"queries": queries, **few}))
        calls.append(("extract_kv", name, prove_extract, {"queries": queries, **few}))
    calls += [
        ("move_kv", "", prove_move, {"moves": MOVES}),
        ("move_kv", "all kinds", prove_move, {"moves": ALL_MOVES, "widths": WIDTHS[1:2]}),
        ("move_kv", "in slices", prove_move,
         {"moves": [(0, 1, 1, 2, 40), (2, 0, 2, 20, 45)], "widths": [(torch.bfloat16, 256, 2)]}),
        ("append_kv", "", prove_append, {"companies": COMPANIES, "widths": ALL_WIDTHS}),
        ("append_kv", "crowd", prove_append,
         {"companies": CROWD, "widths": [(torch.bfloat16, 128, 0), (torch.float16, 128, 0)]}),
        ("merge_attention", "", prove_merge, {"companies": COMPANIES, "widths": ALL_WIDTHS}),
    ]  # fmt: skip
    for op, name, function, given in calls:
        yield Unit(f"{op} {name}".strip(), (op,), functools.partial(function, **given), repr(given))


def decode_grids(dtype: torch.dtype, whole: bool) -> Iterator[Grid]:
    """Rows of one token, in slots and in pages."""
    of, base = name_of(dtype), Call((), dtype=dtype)
    name, paged = f"decode, {of}", f"decode in pages, {of}"
    yield Grid(name, base, (1, 16, 33, 70) if whole else (17,))
    yield Grid(paged, base, (17, 150) if whole else (70,), places=ALL_PAGES)
    yield Grid(f"split and merge, {name}", base, (300,), options=({}, {"window": 20}),
               places=FEW_SLOTS)  # fmt: skip
    yield Grid(f"split and merge, {paged}", base, (300,), places=FEW_PAGES)
    for heads, head_dim in DECODE_SHAPES[1:]:
        shaped = dataclasses.replace(base, heads=heads, head_dim=head_dim)
        yield Grid(f"{name}, {head_dim} dims", shaped, (18,), (1,), OPTIONS[:3:2], (), FEW_SLOTS)
        yield Grid(f"{paged}, {head_dim} dims", shaped, (18,), places=FEW_PAGES)
    if whole:
        lengths = (2, 3, 8, 15, 17, 18, 64, 65)
        yield Grid(name, base, lengths, places=FEW_SLOTS)
        yield Grid(name, base, (5, 18, 70), options=ALL_OPTIONS[1:], places=FEW_SLOTS)
        yield Grid(name, base, (5,), places=(alone, in_crowd))
        yield Grid(paged, base, (18, 70), options=ALL_OPTIONS[1:], places=FEW_PAGES)
        yield Grid(paged, base, (5,), places=(alone, in_pages_in_crowd))
        yield Grid(f"split and merge, {name}", base, (514,), places=FEW_SLOTS)


def prefill_grids(dtype: torch.dtype, whole: bool) -> Iterator[Grid]:
    """Rows of several tokens, in slots and in pages."""
    of, base = name_of(dtype), Call((), dtype=dtype)
    name, paged = f"prefill, {of}", f"prefill in pages, {of}"
    few = f"prefill of 2 tokens, {of}"
    yield Grid(few, base, (18,), (2,), ALL_OPTIONS if whole else OPTIONS[:1], ((5, 2), (6, 2)),
               FEW_SLOTS)  # fmt: skip
    yield Grid(paged, base, (18,), (2,), places=ALL_PAGES)
    yield Grid(name, base, (), (), ({},), CUTS if whole else CUTS[:2])
    yield Grid(f"prefill and decode, {of}", base, (), (), ({},), ((9, 4), (9, 1)))
    for head_dim in (80, 96, 128, 256):
        shaped = dataclasses.replace(base, head_dim=head_dim)
        options = (OPTIONS[0], OPTIONS[2]) if whole else OPTIONS[:1]
        yield Grid(f"{name}, {head_dim} dims", shaped, (18,), (2,), options, (), FEW_SLOTS)
        yield Grid(f"{paged}, {head_dim} dims", shaped, (18,), (2,), places=FEW_PAGES)
    if whole:
        yield Grid(few, base, (5,), (2,), places=(alone, in_crowd))
        yield Grid(name, base, (18, 70), (9,), places=FEW_SLOTS)
        yield Grid(name, base, (), (), OPTIONS[1:], CUTS[1:])
        yield Grid(f"prefill of whole tiles, {of}", base, (), (), ({},), WHOLE)
        yield Grid(f"prefill of whole tiles with finite values, {of}",
                   dataclasses.replace(base, finite=True), (), (), ({},), WHOLE)  # fmt: skip
        yield Grid(f"prefill in segments, {of}", base, (514,), (2,), ({}, {"window": 20}),
                   places=(alone, with_idle_tokens, between_others))  # fmt: skip
        yield Grid(f"prefill in segments, {of}", base, (1030,), (2,), ({"window": 600},),
                   places=(alone, with_idle_tokens))  # fmt: skip
        yield Grid(paged, base, (70,), (2,), OPTIONS[2:3], places=FEW_PAGES)
        yield Grid(paged, base, (5,), (2,), places=(alone, in_pages_in_crowd))


def prefill_by_32_grids(dtype: torch.dtype) -> Iterator[Grid]:
    """Those that compute capability 8.0 takes for calls that fill the device."""
    base = Call((), dtype=dtype, head_dim=128)
    name = f"prefill by 32 vectors, {name_of(dtype)}"
    yield Grid(name, base, (18,), (2, 9), OPTIONS, (), SLOTS_BY_32)
    # Two warps of 32. In one tile of keys: another one is at the border for 32 vectors where it may
    # be in the middle for 16 of them, or seen by none.
    yield Grid(name, base, (32,), (30,), ({},), (), (alone, by_32_vectors))
    yield Grid(f"{name}, in pages", base, (18,), (9,), OPTIONS[:1], (), PAGES_BY_32)


def generic_grids(dtype: torch.dtype, whole: bool) -> Iterator[Grid]:
    """The kernel of what has no other: float32, other head dims, rows that are not aligned."""
    of = name_of(dtype)
    base = Call((), dtype=dtype, head_dim=64 if dtype is torch.float32 else 24)
    name = f"generic, {of}"
    yield Grid(name, base, (5, 17), (1, 2), OPTIONS[:3:2], (*CUTS[:2], (20, 1)), FEW_SLOTS)
    yield Grid(f"{name}, in pages", base, (33,), (1, 2), places=ALL_PAGES)
    yield Grid(name, dataclasses.replace(base, heads=(1, 1)), (5, 18), (1,), places=FEW_SLOTS)
    yield Grid(f"{name}, split", base, (300,), (1,), ({}, {"window": 20}), places=FEW_SLOTS)
    if whole:
        yield Grid(name, base, (1, 2, 5, 33), (1, 2, 5), ALL_OPTIONS, CUTS)
        yield Grid(name, base, (5,), (1, 2), places=(alone, in_crowd))
        yield Grid(f"{name}, in segments", base, (514,), (2,), ({}, {"window": 20}),
                   places=(alone, with_idle_tokens, between_others))  # fmt: skip
        yield Grid(f"{name}, in pages", base, (5,), (1,), OPTIONS[1:], places=FEW_PAGES)
        yield Grid(f"{name}, in pages", base, (5,), (1,), places=(alone, in_pages_in_crowd))
    if dtype is torch.float32:
        yield Grid(f"{name}, 80 dims", dataclasses.replace(base, head_dim=80), (9,), (1, 3))


STEMS = {torch.float16: "half", torch.bfloat16: "bfloat16"}


def units(architecture: int) -> Iterator[Unit]:
    """All there is to prove; each grid is a unit, so that they share processors."""
    yield from copy_units()
    if architecture == 80 and importlib.util.find_spec("triton"):
        yield from triton_units()
    # The kernels of the two dtypes are instances of the same templates, and what nvcc makes of them
    # for the newer architectures is the same code in other words: one of each has all grids.
    main = torch.bfloat16 if architecture >= 80 else torch.float16
    for dtype in (main, *(STEMS.keys() - {main}), torch.float32):
        whole = (
            architecture == 80
            and dtype is torch.float32
            or (architecture in PTX_ARCHITECTURES and dtype is main)
        )
        grids = [*generic_grids(dtype, whole)]
        if dtype in STEMS:
            grids = [*prefill_grids(dtype, whole), *decode_grids(dtype, whole), *grids]
            if architecture == 80 and whole:
                grids += prefill_by_32_grids(dtype)
        for number, grid in enumerate(grids):
            sources = ["ragged_attention"]
            if "generic" not in grid.kernel:
                # The first call of a grid of pages is the dense kernel's.
                sources += [STEMS[dtype]] + [f"{STEMS[dtype]}_paged"] * grid.paged
            yield Unit(
                f"{number} {grid.kernel}",
                tuple(sources),
                functools.partial(prove_grid, grid=grid),
                grid.text,
            )


def prove_grid(prover: Prover, grid: Grid) -> None:
    prove(prover, [grid])


def triton_grids() -> Iterator[Grid]:
    """Rows of one token, in slots and in pages, by Triton's kernels."""
    for dtype in STEMS:
        of, base = name_of(dtype), Call((), dtype=dtype)
        yield Grid(f"Triton's decode, {of}", base, (5, 18, 70), (1,), OPTIONS[:3], (), FEW_SLOTS)
        yield Grid(f"Triton's decode in pages, {of}", base, (18, 70), places=FEW_PAGES)
        yield Grid(f"Triton's split and merge, {of}", base, (300, 600), places=FEW_SLOTS)


def prove_triton(prover: Prover, grid: Grid) -> None:
    """Proves the same statements about Triton's code."""
    # Triton need not be installed for all the rest.
    from emulation.prove.triton_ptx import TritonOps

    prover.ops = TritonOps(prover.terms, prover.architecture)
    prove(prover, [grid])


def triton_units() -> Iterator[Unit]:
    """Units for sm_80, which the named source stands for: no other architecture has its PTX."""
    sources = [
        Path(__file__).with_name("triton_ptx.py"),
        *(ROOT / "baton_kernels" / "triton").rglob("*.py"),
    ]
    what = f"triton {importlib.metadata.version('triton')} {hash_of(sources).hex()}"
    for number, grid in enumerate(triton_grids()):
        yield Unit(
            f"{number} {grid.kernel}", ("bfloat16",),
            functools.partial(prove_triton, grid=grid), f"{grid.text} {what}",
        )  # fmt: skip
