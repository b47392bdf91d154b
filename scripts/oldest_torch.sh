#!/usr/bin/env bash
# Compiles the bindings of both libraries against the headers of the oldest torch that the package
# promises to work with, which setup.py names. The headers are those of torch's wheel for macOS: the
# same files as for Linux in a tenth of the bytes. They are kept under build/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
version=$(sed -n 's/^MINIMUM_TORCH = (\([0-9]*\), \([0-9]*\))$/\1.\2.0/p' setup.py)
headers=build/torch-$version
if [ ! -f "$headers/torch/version.py" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: \
    --python-version=3.12 --implementation=cp --platform=macosx_11_0_arm64 \
    --platform=macosx_14_0_arm64 --dest="$scratch" "torch==$version"
  "$python" - "$scratch"/*.whl "$headers" <<'PYTHON'
import sys
import zipfile

wheel, target = sys.argv[1:]
folders = ("csrc/stable/", "csrc/inductor/aoti_torch/", "headeronly/")
with zipfile.ZipFile(wheel) as content:
    wanted = tuple(f"torch/include/torch/{folder}" for folder in folders)
    names = [name for name in content.namelist() if name.startswith(wanted)]
    content.extractall(target, [*names, "torch/version.py"])
PYTHON
fi
# Of the machine's CUDA, or of a CUDA torch's packages.
cuda=
for folder in "${CUDA_HOME:-/usr/local/cuda}/include" \
  "${CUDA_VENV:-.venv-cuda}"/lib/python3*/site-packages/nvidia/cu13/include; do
  if [ -z "$cuda" ] && [ -f "$folder/cuda_runtime_api.h" ]; then cuda=$folder; fi
done
if [ -z "$cuda" ]; then
  echo "oldest_torch.sh: cuda_runtime_api.h was not found: set CUDA_HOME" >&2
  exit 1
fi
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
target=$(grep -o 'TORCH_TARGET_VERSION=0x[0-9a-f]*' CMakeLists.txt)
for source in csrc/bindings/*.cpp csrc/bindings/cuda/*.cpp; do
  ${CXX:-c++} -std=c++20 -fsyntax-only -fvisibility=hidden -Wall -Wextra "-D$target" -DUSE_CUDA \
    '-DBATON_CUDA_ARCHITECTURES="90"' -I csrc -isystem "$headers/torch/include" \
    -isystem "$include" -isystem "$cuda" "$source" || {
    echo "$source does not compile next to torch $version, which setup.py promises" >&2
    exit 1
  }
done
echo "both libraries' bindings compile next to torch $version"
