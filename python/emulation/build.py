"""Compiles kernels with the host compiler: Python modules of them, or programs with a sanitizer.

Objects, programs and modules are kept in ``build/emulation`` (see artifacts.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from emulation.artifacts import ROOT, hash_of, kept, run_compiler
from emulation.tools import cuda_include, with_includes

CUDA = ROOT / "python" / "emulation" / "cuda"
BUILD = ROOT / "build" / "emulation"
DISPATCH = ROOT / "csrc" / "common" / "dispatch.cpp"
KERNELS = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
RUNTIME = [
    CUDA / f"{name}.cpp" for name in ("fiber", "runtime", "accesses", "counters", "products")
]
JUDGE = [CUDA / "judge.cpp"]
DEFECTS = CUDA / "defects" / "main.cu"
COMPILER = os.environ.get("CXX", "g++").split()[0]
COMMON = [
    "-std=c++20", "-fPIC", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    # The kernels' arithmetic is the device's: no contraction that the source does not write.
    "-ffp-contract=off", "-fvisibility=hidden", "-fno-omit-frame-pointer",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compile: ``kernel`` flags for kernels only, ``every`` for all sources."""

    name: str
    kernel: tuple[str, ...] = ()
    every: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    runtime: tuple[Path, ...] = tuple(RUNTIME)


# -fsanitize=thread without its library: the compiler announces every access, the judge listens.
ANNOUNCE = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-Wno-tsan")
FAST = Variant("fast", every=("-O2",))
# The code that hands kernels to Python: the same object for every module.
GLUE = Variant("glue", every=("-O1",))
JUDGED = Variant(
    "judged",
    kernel=ANNOUNCE,
    every=("-O1", "-DEMULATION_JUDGE"),
    runtime=(*RUNTIME, *JUDGE),
)
# The branch without cp.async and bfloat16 products.
JUDGED_75 = dataclasses.replace(JUDGED, name="judged75", every=(*JUDGED.every, "-DBATON_ARCH=750"))
_ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Not optimized: compiled in half of the time, and its one program runs few blocks.
ADDRESS = Variant("address", every=("-O0", *_ADDRESS), link=_ADDRESS)
THREAD = Variant(
    "thread",
    kernel=("-fsanitize=thread", "-Wno-tsan"),
    every=("-O1", "-DEMULATION_TSAN"),
    link=("-fsanitize=thread",),
)


@functools.cache
def compiler_version() -> str:
    """Another compiler makes other objects."""
    return subprocess.run(
        [COMPILER, "--version"], capture_output=True, text=True, check=True
    ).stdout


def _made(name: str, command: Sequence[str], sources: Iterable[Path]) -> Path:
    """The file of that name which ``command -o <path>`` makes of the sources."""
    return kept(
        BUILD / name,
        [compiler_version(), *command, hash_of(sources)],
        lambda path: run_compiler([*command, "-o", path]),
    )


def at_once(jobs: Iterable[Callable[[], Path]]) -> list[Path]:
    """Results of compilations, one of which runs per processor at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: job(), jobs))


def compile_object(source: Path, variant: Variant, *flags: str) -> Path:
    """One source compiled for a variant."""
    is_kernel = source.suffix == ".cu"
    command = [
        COMPILER, *COMMON, *variant.every, *(variant.kernel if is_kernel else ()), *flags,
        "-I", "csrc", "-I", "python", "-isystem", str(cuda_include()),
        "-x", "c++", "-c", str(source.relative_to(ROOT)),
    ]  # fmt: skip
    sources = with_includes(source, (ROOT / "csrc", ROOT / "python"))
    return _made(f"{variant.name}-{source.stem}.o", command, sources)


def compile_objects(sources: Iterable[Path], variant: Variant) -> list[Path]:
    """Several sources compiled for a variant."""
    return at_once(functools.partial(compile_object, source, variant) for source in sources)


def build_program(name: str, sources: Iterable[Path], variant: Variant, *objects: Path) -> Path:
    """An executable of the sources, the emulator, and what is compiled already."""
    objects += tuple(compile_objects((*sources, *variant.runtime), variant))
    command = [COMPILER, *variant.link, *map(str, objects)]
    return _made(f"{variant.name}-{name}.run", command, objects)


def build_library(source: Path, *flags: str) -> Path:
    """A shared library of one source that is not about CUDA."""
    command = [COMPILER, *COMMON, "-shared", *flags, str(source.relative_to(ROOT))]
    return _made(f"{source.stem}.so", command, [source])


def build_module(variant: Variant) -> ModuleType:
    """The Python module of all kernels; module.cpp names the variants that have one."""
    import pybind11

    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    sources = [*KERNELS, DISPATCH, *variant.runtime]
    jobs = [functools.partial(compile_object, source, variant) for source in sources]
    jobs.append(functools.partial(compile_object, CUDA / "module.cpp", GLUE, *python))
    objects = at_once(jobs)
    command = [COMPILER, "-shared", *map(str, objects)]
    name = f"emulated_{variant.name}"
    path = _made(f"{name}.so", command, objects)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
