"""A folder in the format of Hugging Face's kernel hub, for transformers' continuous batching.

    python scripts/hub_kernel.py FOLDER              # the installed package does the work
    python scripts/hub_kernel.py FOLDER --compiled   # with its own library, for any torch >= 2.10

FOLDER then contains `build.toml` (edition 5) and one variant of flash-attn's functions of
`baton_kernels.flash`. That of the first command, `build/torch-cpu`, imports the installed package,
so it is for local use. The second command compiles `csrc` into `build/torch-stable-abi210-cpu-...`,
which needs nothing else: its ops, package and library have other names, so it does not conflict
with an installed baton_kernels, or with another version of the folder. Either way:

    LOCAL_KERNELS=baton/flash=FOLDER transformers serve MODEL --attn-implementation baton/flash \\
        --continuous-batching --device cpu
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path

from instrumented import ROOT, build_package

NAME = "baton-flash"
LICENSE = "Apache-2.0"
VERSION = 1
# The torch whose stable ABI the library is compiled for (CMakeLists.txt).
STABLE_ABI = "2.10"

GENERAL = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cpu"]
"""
MODULE = '''"""flash-attn's functions on the CPU, as baton_kernels computes them."""

from baton_kernels.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
'''
# The hub loads this file by its path under a made-up name, so it loads the package likewise.
LOADER = '''"""flash-attn's functions on the CPU, with the library that they run on."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{package}"
if _NAME not in sys.modules:
    _folder = Path(__file__).parent / _NAME
    _spec = importlib.util.spec_from_file_location(
        _NAME, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])

from {package}.flash import (  # noqa: E402
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
'''


def metadata(identity: str) -> str:
    """A variant's metadata.json."""
    return json.dumps(
        {
            "id": identity, "name": NAME, "version": VERSION, "license": LICENSE,
            "python-depends": [], "backend": {"type": "cpu"},
        },
        indent=2,
    ) + "\n"  # fmt: skip


def write_hub_kernel(folder: Path) -> None:
    """Writes the variant that imports the installed package; other files in it are kept.

    Args:
        folder: created if it does not exist.
    """
    variant = folder / "build" / "torch-cpu"
    variant.mkdir(parents=True, exist_ok=True)
    (folder / "build.toml").write_text(f"{GENERAL}\n[torch-noarch]\n")
    (variant / "metadata.json").write_text(metadata("_baton_flash_cpu_local"))
    (variant / "__init__.py").write_text(MODULE)


def write_compiled_hub_kernel(folder: Path) -> Path:
    """Compiles and writes the variant with a library; other files in the folder are kept.

    Args:
        folder: created if it does not exist.

    Returns:
        The library.

    Raises:
        subprocess.CalledProcessError: CMake or the compiler failed; it has said why.
    """
    # The hub's loader gives the variant itself the name of its identity.
    package, identity = (f"_baton_{what}_cpu_{digest()}" for what in ("kernels", "flash"))
    build = ROOT / "build" / "hub"
    build_package(build, "-O3 -DNDEBUG", None, namespace=package)
    machine = platform.machine().replace("arm64", "aarch64")
    abi = STABLE_ABI.replace(".", "")
    variant = folder / "build" / f"torch-stable-abi{abi}-cpu-{machine}-linux"
    with tempfile.TemporaryDirectory() as made:
        inner = Path(made) / package
        shutil.copytree(build / "package" / "baton_kernels", inner)
        for path in inner.rglob("*.py"):
            path.write_text(path.read_text().replace("baton_kernels", package))
        library = inner / f"lib{package}.so"
        (inner / "libbaton_kernels.so").rename(library)
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(inner, variant / package)
    (folder / "build.toml").write_text(f'{GENERAL}\n[torch]\nstable-abi = "{STABLE_ABI}"\n')
    (variant / "metadata.json").write_text(metadata(identity))
    (variant / "__init__.py").write_text(LOADER.format(package=package))
    return variant / package / library.name


def digest() -> str:
    """Ten hexadecimal digits that change with what is compiled or copied."""
    digest = hashlib.sha256()
    for kind in ("csrc/**/*.h", "csrc/**/*.cpp", "baton_kernels/**/*.py"):
        for path in sorted(ROOT.glob(kind)):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--compiled", action="store_true", help="with its own library; takes minutes"
    )
    arguments = parser.parse_args()
    if arguments.compiled:
        print(write_compiled_hub_kernel(arguments.folder))
    else:
        write_hub_kernel(arguments.folder)


if __name__ == "__main__":
    main()
