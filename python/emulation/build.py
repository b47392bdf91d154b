"""Compiles kernels with the host compiler: Python modules of them, or programs with a sanitizer.

Objects are kept in ``build/emulation`` under the hash of all that they are made from, so that
nothing is compiled twice.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from emulation.tools import cuda_include, with_includes

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "python" / "emulation" / "cuda"
BUILD = ROOT / "build" / "emulation"
DISPATCH = ROOT / "csrc" / "common" / "dispatch.cpp"
KERNELS = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
RUNTIME = [CUDA / f"{name}.cpp" for name in ("fiber", "runtime", "accesses", "counters")]
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
    """One way to compile: ``kernel`` flags for kernels alone, ``every`` for all sources."""

    name: str
    kernel: tuple[str, ...] = ()
    every: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    runtime: tuple[Path, ...] = tuple(RUNTIME)


# -fsanitize=thread without its library: the compiler announces every access, the judge listens.
ANNOUNCE = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-Wno-tsan")
FAST = Variant("fast", every=("-O2",))
JUDGED = Variant(
    "judged",
    kernel=ANNOUNCE,
    every=("-O1", "-DEMULATION_JUDGE"),
    runtime=(*RUNTIME, *JUDGE),
)
# The branch without cp.async and bfloat16 products.
JUDGED_75 = dataclasses.replace(JUDGED, name="judged75", every=(*JUDGED.every, "-DBATON_ARCH=750"))
_ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ADDRESS = Variant("address", every=("-O1", *_ADDRESS), link=_ADDRESS)
THREAD = Variant(
    "thread",
    kernel=("-fsanitize=thread", "-Wno-tsan"),
    every=("-O1", "-DEMULATION_TSAN"),
    link=("-fsanitize=thread",),
)


def _hash_of(paths: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def _cached(command: list[str], made_from: bytes, suffix: str, stem: str) -> Path:
    """Runs ``command -o <path>`` unless the same was done before."""
    key = hashlib.sha256(" ".join(command).encode() + made_from).hexdigest()[:16]
    target = BUILD / f"{stem}-{key}{suffix}"
    BUILD.mkdir(parents=True, exist_ok=True)
    # Several test processes may want the same file.
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in BUILD.glob(f"{stem}-*{suffix}"):
                old.unlink()
            unfinished = target.with_suffix(".tmp")
            done = subprocess.run(
                [*command, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            unfinished.rename(target)
    return target


def compile_object(source: Path, variant: Variant, *flags: str) -> Path:
    """One source compiled for a variant."""
    is_kernel = source.suffix == ".cu"
    command = [
        COMPILER, *COMMON, *variant.every, *(variant.kernel if is_kernel else ()), *flags,
        "-I", "csrc", "-I", "python", "-isystem", str(cuda_include()),
        "-x", "c++", "-c", str(source.relative_to(ROOT)),
    ]  # fmt: skip
    made_from = _hash_of(with_includes(source, (ROOT / "csrc", ROOT / "python")))
    return _cached(command, made_from, ".o", f"{variant.name}-{source.stem}")


def build_program(name: str, sources: Iterable[Path], variant: Variant, *objects: Path) -> Path:
    """An executable of the sources, the emulator, and what is compiled already."""
    objects += tuple(compile_object(source, variant) for source in (*sources, *variant.runtime))
    command = [COMPILER, *variant.link, *map(str, objects)]
    return _cached(command, _hash_of(objects), ".run", f"{variant.name}-{name}")


def build_library(source: Path, *flags: str) -> Path:
    """A shared library of one source that is not about CUDA."""
    command = [COMPILER, *COMMON, "-shared", *flags, str(source.relative_to(ROOT))]
    return _cached(command, _hash_of([source]), ".so", source.stem)


def build_module(variant: Variant) -> ModuleType:
    """The Python module of all kernels."""
    import pybind11

    name = f"emulated_{variant.name}"
    python = [
        f"-DBATON_MODULE={name}",
        "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"),
    ]  # fmt: skip
    sources = [*KERNELS, DISPATCH, *variant.runtime]
    objects = [compile_object(source, variant) for source in sources]
    objects.append(compile_object(CUDA / "module.cpp", variant, *python))
    command = [COMPILER, "-shared", *map(str, objects)]
    path = _cached(command, _hash_of(objects), ".so", name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
