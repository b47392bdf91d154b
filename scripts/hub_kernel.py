"""A folder in the format of Hugging Face's kernel hub, for transformers' continuous batching.

    python scripts/hub_kernel.py FOLDER

FOLDER then contains `build.toml` (edition 5) and the variant `build/torch-cpu`: flash-attn's
functions of `baton_kernels.flash` from the installed package, so it is for local use:

    LOCAL_KERNELS=baton/flash=FOLDER transformers serve MODEL --attn-implementation baton/flash \\
        --continuous-batching --device cpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAME = "baton-flash"
LICENSE = "Apache-2.0"
VERSION = 1

BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cpu"]

[torch-noarch]
"""
METADATA = {
    "id": "_baton_flash_cpu_local",
    "name": NAME,
    "version": VERSION,
    "license": LICENSE,
    "python-depends": [],
    "backend": {"type": "cpu"},
}
MODULE = '''"""flash-attn's functions on the CPU, as baton_kernels computes them."""

from baton_kernels.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
'''


def write_hub_kernel(folder: Path) -> None:
    """Writes the folder; other files in it are kept.

    Args:
        folder: created if it does not exist.
    """
    variant = folder / "build" / "torch-cpu"
    variant.mkdir(parents=True, exist_ok=True)
    (folder / "build.toml").write_text(BUILD)
    (variant / "metadata.json").write_text(json.dumps(METADATA, indent=2) + "\n")
    (variant / "__init__.py").write_text(MODULE)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write_hub_kernel(parser.parse_args().folder)


if __name__ == "__main__":
    main()
