"""On the machine with the GPU: puts the output of `make gpu-carry` where the stages find it.

Uses only the standard library, because it runs before anything else is known to work.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "gpu-carry"
# In the folder: libraries of baton_kernels, peers as archives, and the commit they were built from.
LIBRARIES, PEERS, COMMIT = "lib", "peers", "commit"


def environment(root: Path) -> dict[str, str]:
    """The environment of every stage: it uses the sources directly instead of an installed
    package."""
    path = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def unpack(folder: Path, root: Path, environment: MutableMapping[str, str]) -> list[str]:
    """Copies the libraries next to the sources and adds the peers to the path; returns a log."""
    lines = []
    for library in sorted((folder / LIBRARIES).glob("*.so")):
        target = root / "baton_kernels" / library.name
        # The file is replaced and never overwritten, because a process may have the old one mapped.
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
        # FlashInfer writes into a cache folder even if it has nothing to compile.
        environment["FLASHINFER_WORKSPACE_BASE"] = str(site)
    return lines


def commit(folder: Path, here: str) -> str:
    """The commit of the sources; where there is no git repository, the one that was carried."""
    path = folder / COMMIT
    return path.read_text().strip() if here == "unknown" and path.is_file() else here
