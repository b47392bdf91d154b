"""The attention kernels with one line wrong, for the judges to find.

A copy of attention's files has a number at every barrier and wait, and at some indices; the program
that is made of it leaves out, or spoils, the one that it is told.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

from emulation import build
from emulation.artifacts import ROOT, kept

ATTENTION = Path("cuda", "ragged_attention")
BARRIER = re.compile(
    r"\b(?:__sync(?:threads|warp)|copy_async_wait<\w+>|wait_for_grid_before|fence_products|"
    r"fence_registers|commit_products|wait_for_products<\d>|wait_for_phase|arrive_as_warp)"
    r"\([^;{]*\);"
)
# File, what stands there, the same with a mistake where WRONG holds, and what that makes of it.
SPOILT = [
    (
        "rows.h", "a.max_splits + split;", "a.max_splits + (WRONG ? 0 : split);",
        "splits of a row share one partial result",
    ),
    (
        "decode.h", "&shared.out[warp][n]", "&shared.out[WRONG ? 0 : warp][n]",
        "warps of a block share one partial result",
    ),
    (
        "prefill_tile.h", "(2 * stage + which)", "(WRONG ? which : 2 * stage + which)",
        "all tiles share one stage",
    ),
    (
        "warpgroup_ring.h", "RingPlace{0, parity ^ 1}", "RingPlace{0, WRONG ? parity : parity ^ 1}",
        "every round waits for the first one's phase",
    ),
    (
        "warpgroup_ring.h", "% 2 ^ 1);", "% 2 ^ (WRONG ? 0 : 1));",
        "places are waited for as if they were not empty at first",
    ),
    (
        "warpgroup_block.h", "kPanelBytes, kSwizzleBytes);",
        "kPanelBytes, WRONG ? 2 * kPanelBytes : kSwizzleBytes);",
        "a descriptor's eights of rows lie too far apart",
    ),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A planted mistake: the ``ordinal``-th call of a kind in ``file`` is left out, or another."""

    number: int
    file: str
    what: str
    ordinal: int = 1

    def __str__(self) -> str:
        return f"{self.file}: {self.what} #{self.ordinal}"

    @property
    def kernels(self) -> str:
        """The kernels that have the mistake, in the program's words."""
        if self.file.startswith("warpgroup"):
            return "warpgroup"
        return "generic" if "generic" in self.file else "tensor_core"


def _number_barriers(name: str, text: str, found: list[Mutant]) -> str:
    ordinals: dict[str, int] = {}

    def number(match: re.Match) -> str:
        call = match[0].partition("(")[0]
        ordinals[call] = ordinals.get(call, 0) + 1
        found.append(Mutant(len(found) + 1, name, call, ordinals[call]))
        return f"if (mutant != {len(found)}) {match[0]}"

    # A comment may name what it is about.
    return "".join(
        line if line.lstrip().startswith("//") else BARRIER.sub(number, line)
        for line in text.splitlines(keepends=True)
    )


@functools.cache
def _copies() -> tuple[tuple[Mutant, ...], dict[str, str]]:
    """All mutants, and the copies' text by name."""
    found: list[Mutant] = []
    texts = {
        path.name: _number_barriers(path.name, path.read_text(), found)
        for path in sorted((ROOT / "csrc" / ATTENTION).iterdir())
    }
    for file, right, wrong, what in SPOILT:
        if texts[file].count(right) != 1:
            raise ValueError(f"{file} has {right!r} {texts[file].count(right)} times, not once")
        found.append(Mutant(len(found) + 1, file, what))
        texts[file] = texts[file].replace(right, wrong.replace("WRONG", f"mutant == {len(found)}"))
    return tuple(found), texts


def all_mutants() -> tuple[Mutant, ...]:
    return _copies()[0]


@functools.cache
def program(variant: build.Variant) -> Path:
    """Runs one: ``program <number, 0 for none> <generic, tensor_core or warpgroup>``."""
    texts = _copies()[1]

    def make(folder: Path) -> None:
        (folder / ATTENTION).mkdir(parents=True)
        for name, text in texts.items():
            (folder / ATTENTION / name).write_text(text)

    folder = kept(build.BUILD / "mutants", [part for pair in texts.items() for part in pair], make)
    source = build.CUDA / "mutants.cu"
    # Before csrc, whose files of the same names it hides.
    kernels = build.compile_object(source, variant, "-I", str(folder.relative_to(ROOT)))
    return build.build_program("mutants", [build.DISPATCH], variant, kernels)
