"""Outputs of compilers, kept under the hash of everything that they are made from.

Test processes that run at the same time share the folder: each file has a lock, so that two
processes that want the same file compile it once, and two that want different files do not wait for
each other.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from emulation.tools import INSTALL, tool

ROOT = Path(__file__).resolve().parents[2]
# A file that has not been used in this time makes room, so that two branches can take turns.
KEPT_SECONDS = 14 * 24 * 3600


def hash_of(paths: Iterable[Path]) -> bytes:
    """A hash of the files' names and contents; the same files elsewhere have the same hash."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: (path.name, path)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def kept_path(target: Path, made_from: Iterable[bytes | str]) -> Path:
    """Where `kept` has the file or folder, if it was made."""
    digest = hashlib.sha256()
    for part in made_from:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return target.with_name(f"{target.stem}-{digest.hexdigest()[:16]}{target.suffix}")


def kept(target: Path, made_from: Iterable[bytes | str], make: Callable[[Path], object]) -> Path:
    """The file or folder that ``make(path)`` writes, made once per content.

    Args:
        target: its name; the hash of ``made_from`` is put before the suffix.
        made_from: everything that its contents depend on: compiler, flags, sources, headers.
        make: writes it; when it raises, nothing is kept.
    """
    path = kept_path(target, made_from)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            os.utime(path)
            return path
        for old in path.parent.glob(f"{target.stem}-{'[0-9a-f]' * 16}{target.suffix}"):
            if old.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        # Under another name until it is whole: a reader needs no lock.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            unfinished = Path(folder) / path.name
            make(unfinished)
            unfinished.rename(path)
    return path


def run_compiler(command: Sequence[str | Path]) -> subprocess.CompletedProcess:
    """Runs a compiler in the root of the checkout; RuntimeError with what it says if it fails.

    Every run has a temporary folder to itself. nvcc names its intermediate files by the process,
    and two runs at once, even of different users, have been seen to delete each other's.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done


@functools.cache
def nvcc_version() -> str:
    """Another nvcc makes other code."""
    return run_nvcc("--version").stdout


def run_nvcc(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs nvcc: the only place that does. FileNotFoundError says what to install."""
    nvcc = tool("nvcc")
    if not nvcc:
        raise FileNotFoundError(INSTALL)
    return run_compiler([nvcc, *arguments])
