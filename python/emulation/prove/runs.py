"""Runs units of proof one after another or several at once, and keeps what came of each.

A unit is proved once for all architectures of which nvcc makes the same PTX. Results are kept on
disk under the hash of everything that they depend on: a run that was interrupted goes on where it
stopped, and one after a change repeats what the change may touch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from emulation import build
from emulation.artifacts import ROOT, hash_of, kept, kept_path, nvcc_version
from emulation.cuda.ops import module
from emulation.prove.claims import FAILED, Claim, Coverage, Prover
from emulation.ptx.machine import compile_ptx
from emulation.ptx.ops import source_of
from emulation.static.kernels import ARCHITECTURES, FRONT_END, SOURCES

BUILD = ROOT / "build" / "prove"
HERE = Path(__file__).parent
# Sources on which a unit's result depends, besides the kernels and the unit itself.
PROVER = [
    *(HERE / f"{name}.py" for name in ("attention", "claims", "copies", "grids")),
    *sorted((HERE.parent / "ptx").glob("*.py")),
    *sorted(path for path in (HERE.parent / "cuda").iterdir() if path.is_file()),
]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the proof that runs by itself.

    Args:
        name: for files and progress.
        sources: stems of the files whose kernels it launches.
        prove: does it.
        what: everything that ``prove`` depends on and its code does not say.
    """

    name: str
    sources: tuple[str, ...]
    prove: Callable[[Prover], None]
    what: str


@dataclasses.dataclass
class Result:
    """The result of a unit on one PTX."""

    unit: Unit
    architecture: int
    claims: list[Claim]
    coverage: dict[str, Coverage]
    terms: int
    seconds: float  # of a processor


@functools.cache
def ptx_text(path: Path, architecture: int) -> str:
    """PTX with its source lines. Architectures that share a front end have the PTX of the first."""
    return compile_ptx(path, FRONT_END[architecture], flags=("-lineinfo",))


@functools.cache
def normalized(path: Path, architecture: int) -> str:
    """The text without what names the target, comments and source lines."""
    dropped = r"//.*|\.target .*|^\s*\.(loc|file)\s.*"
    text = re.sub(dropped, "", ptx_text(path, architecture), flags=re.M)
    return re.sub(r"\s*\n\s*", "\n", text)


def path_of(stem: str) -> Path:
    return next(path for path in SOURCES if path.stem == stem)


@functools.cache
def representative(sources: tuple[str, ...], architecture: int) -> int:
    """The first architecture for which nvcc makes the same PTX of these files."""
    texts = [normalized(path_of(stem), architecture) for stem in sources]
    return next(
        other for other in ARCHITECTURES
        if texts == [normalized(path_of(stem), other) for stem in sources]
    )  # fmt: skip


def text_of(op: str, kernel: str, architecture: int, sources: Path) -> str:
    return ptx_text(source_of(op, kernel, sources), architecture)


def compile_all(architectures: Sequence[int]) -> None:
    """Compiles what all units need, before they run at the same time."""
    module(build.FAST)
    build.at_once(
        functools.partial(compile_quietly, path, architecture)
        for architecture in sorted({FRONT_END[sm] for sm in architectures})
        for path in SOURCES
    )


def compile_quietly(path: Path, architecture: int) -> Path:
    ptx_text(path, architecture)
    return path


def prove_unit(unit: Unit, architecture: int) -> dict:
    """Runs a unit; what came of it, for JSON."""
    began = time.process_time()
    prover = Prover(architecture, text_of=text_of)
    unit.prove(prover)
    return {
        "claims": [dataclasses.asdict(claim) for claim in prover.claims],
        "coverage": {name: dataclasses.asdict(x) for name, x in prover.coverage.items()},
        "terms": len(prover.terms.nodes),
        "seconds": time.process_time() - began,
    }


def target_of(unit: Unit, architecture: int) -> tuple[Path, list[bytes | str]]:
    """Name of a unit's result, and what it is made from."""
    texts = [normalized(path_of(stem), architecture) for stem in unit.sources]
    slug = re.sub(r"\W+", "_", unit.name)
    made_from = [nvcc_version(), unit.name, unit.what, *texts, code_of_provers()]
    return BUILD / f"sm_{architecture}-{slug}.json", made_from


@functools.cache
def code_of_provers() -> bytes:
    """The prover's code, and that of the kernels' hosts."""
    host = [*(ROOT / "csrc" / "cuda").rglob("*.*"), *(ROOT / "csrc" / "common").glob("*.*")]
    return hash_of([*host, *PROVER])


def is_kept(unit: Unit, architecture: int) -> bool:
    """Whether a unit's result is on disk."""
    return kept_path(*target_of(unit, architecture)).exists()


def result_of(unit: Unit, architecture: int) -> Result:
    """A unit's result, from disk if it is there."""

    def make(path: Path) -> None:
        path.write_text(json.dumps(prove_unit(unit, architecture)))

    found = json.loads(kept(*target_of(unit, architecture), make).read_text())
    coverage = {
        name: Coverage(*({int(at): y for at, y in part.items()} for part in x.values()))
        for name, x in found["coverage"].items()
    }
    claims = [Claim(**claim) for claim in found["claims"]]
    return Result(unit, architecture, claims, coverage, found["terms"], found["seconds"])


def _run(job: tuple[Unit, int]) -> Result:
    """A unit's result. Where it has an error, that is what is known of it; the others go on."""
    torch.set_num_threads(1)
    try:
        return result_of(*job)
    except Exception as error:
        traceback.print_exc()
        unit, architecture = job
        failed = Claim(unit.name, architecture, FAILED, unit.what, 1, repr(error))
        return Result(unit, architecture, [failed], {}, 0, 0.0)


def run(jobs: Sequence[tuple[Unit, int]], processes: int, seconds: float = 0.0) -> Iterator[Result]:
    """Results of units on architectures, as they come: first those on disk.

    Each of the others has a process to itself. After `seconds`, if not 0, no more are begun,
    and what has begun is given up.
    """
    waiting = []
    for job in jobs:
        if is_kept(*job):
            yield result_of(*job)
        else:
            waiting.append(job)
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        results = pool.imap_unordered(_run, waiting, chunksize=1)
        for _ in waiting:
            try:
                yield results.next(max(0.1, until - time.monotonic()) if seconds else None)
            except multiprocessing.TimeoutError:
                return
