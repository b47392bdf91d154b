"""FlashInfer for a machine without a network: its Python files, and the modules that a decode
needs, compiled ahead of time. Its own sources, which are the largest part, are left out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

VERSION = "0.7.2"
# Packages that importing it needs and the other machine lacks.
NEEDED = ("apache-tvm-ffi>=0.1.11,<0.2",)
# Packages that compiling its modules needs and this Python lacks.
TO_COMPILE = (*NEEDED, "nvidia-ml-py", "requests", "urllib3", "idna", "certifi",
              "charset-normalizer", "tqdm", "tabulate", "einops", "ninja", "packaging",
              "click")  # fmt: skip
ARCHITECTURE = "9.0a"
# Folders of the package that a decode does not read; only the Python files of the others are taken.
LEFT_OUT = ("flashinfer/data/",)
# Except for the templates that its generators read even if there is a compiled module.
TEMPLATES = "flashinfer/data/csrc/batch_"
KEPT = (".py", ".so", ".txt", "METADATA")
# bfloat16, heads of 128, on CUDA cores and on tensor cores.
COMPILE = """
import torch
from flashinfer.jit import gen_batch_decode_module, gen_batch_prefill_module
b, i = torch.bfloat16, torch.int32
for spec in (
    gen_batch_decode_module(b, b, b, i, 128, 128, 0, False, False),
    gen_batch_prefill_module("fa2", b, b, b, i, 128, 128, 0, False, False, False),
):
    spec.build(verbose=False)
    print(spec.name, spec.jit_library_path, sep="\\t")
"""


def pack(target: Path, build: Path, download: Callable[..., list[Path]]) -> None:
    """Writes flashinfer.zip into a folder.

    Args:
        target: folder of the archive.
        build: folder that keeps downloads and compiled files for the next time.
        download: fetches wheels into a folder.

    Raises:
        RuntimeError: the compilation produced no library.
    """
    site = build / "site"
    if not site.is_dir():
        wheels = download(build / "wheels", f"flashinfer-python=={VERSION}", *NEEDED)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as content:
                content.extractall(build / "unpacked")
        (build / "unpacked").rename(site)
    modules = build / "modules"
    if not modules.is_dir():
        compile_modules(site, build)
    with zipfile.ZipFile(target / "flashinfer.zip", "w", zipfile.ZIP_LZMA) as archive:
        for file in sorted(site.rglob("*")):
            name = file.relative_to(site).as_posix()
            wanted = name.endswith(KEPT) and not name.startswith(LEFT_OUT)
            if file.is_file() and (wanted or name.startswith(TEMPLATES)):
                archive.write(file, name)
        for library in sorted(modules.glob("*.so")):
            archive.write(library, f"flashinfer/data/aot/{library.stem}/{library.name}")


def runtime_folders() -> list[str]:
    """Folders from which nvcc links the CUDA runtime: FlashInfer derives them from the compiler's
    path, but they need not be next to it."""
    command = [shutil.which("nvcc") or "nvcc", "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', "".join(re.findall(r"LIBRARIES=.*", said)))


def compile_modules(site: Path, build: Path) -> None:
    """Compiles the modules, which takes minutes, and keeps the libraries."""
    here = build / "here"
    if not here.is_dir():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "install", "--no-deps", "--target", str(here), *TO_COMPILE]
        subprocess.run(command, check=True)
    # Only machines with a GPU have the driver's library; the modules use none of its symbols.
    stubs = build / "stubs"
    stubs.mkdir(exist_ok=True)
    command = ["c++", "-shared", "-x", "c", os.devnull, "-o", str(stubs / "libcuda.so")]
    subprocess.run(command, check=True)
    environment = {
        **os.environ,
        "LIBRARY_PATH": os.pathsep.join([str(stubs), *runtime_folders()]),
        "PYTHONPATH": f"{here}{os.pathsep}{site}",
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "FLASHINFER_WORKSPACE_BASE": str(build / "cache"),
        "MAX_JOBS": "1",
    }
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout, done.stderr, file=sys.stderr)
    paths = [line.split("\t")[1] for line in done.stdout.splitlines() if "\t" in line]
    if done.returncode or not paths:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"compiling its modules: {last}")
    scratch = build / "modules.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for path in paths:
        shutil.copy(path, scratch)
    scratch.rename(build / "modules")
