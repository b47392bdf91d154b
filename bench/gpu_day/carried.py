"""On the machine with the GPU: puts what `make gpu-carry` has made where the stages find it.

Uses the standard library only: this runs before anything else is known to work.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "gpu-carry"
# Within it: libraries of baton_kernels, peers as archives, and the commit they were built from.
LIBRARIES, PEERS, COMMIT = "lib", "peers", "commit"


def environment(root: Path) -> dict[str, str]:
    """What every stage runs in: the sources, as they are, instead of an installed package."""
    path = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def unpack(folder: Path, root: Path, environment: MutableMapping[str, str]) -> list[str]:
    """Copies the libraries next to the sources and adds the peers to the path; what was done."""
    lines = []
    for library in sorted((folder / LIBRARIES).glob("*.so")):
        target = root / "baton_kernels" / library.name
        # Never written over: a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copyfile(library, target)
        lines.append(f"library {library.name}, {library.stat().st_size} bytes")
    site = folder / "site"
    for archive in sorted((folder / PEERS).iterdir()) if (folder / PEERS).is_dir() else ():
        with zipfile.ZipFile(archive) as content:
            content.extractall(site)
        lines.append(f"peer {archive.stem}")
    if site.is_dir():
        environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}{os.pathsep}{site}"
        # FlashInfer writes into a cache folder even where it has nothing to compile.
        environment["FLASHINFER_WORKSPACE_BASE"] = str(site)
    return lines


def commit(folder: Path, here: str) -> str:
    """The commit of the sources; the one that was carried where git does not travel along."""
    path = folder / COMMIT
    return path.read_text().strip() if here == "unknown" and path.is_file() else here
