#!/usr/bin/env bash
# Compiles the bindings next to the headers of the oldest torch that is promised, builds the package
# with its CUDA kernels next to a CUDA torch, installs it, and tests what can be tested without a
# GPU, away from the sources.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# nvcc's intermediate files: another nvcc on this machine may use the same names.
export TMPDIR=$work/tmp
mkdir "$TMPDIR"
. scripts/cuda_env.sh
PYTHON=$cuda_python bash scripts/oldest_torch.sh
BATON_CUDA=1 cuda_pip install --no-build-isolation --no-deps --force-reinstall .
root=$PWD
mkdir "$work/tests"
cp -r tests/conftest.py tests/support tests/ops tests/cuda "$work/tests"
# What reads compiled kernels; there are no kernels beside it to emulate.
cp -r "$root/python/emulation" "$work"
cd "$work"
used=$("$cuda_python" - <<'PYTHON'
import torch
import baton_kernels

info = baton_kernels.build_info()
print(*(f"tests/ops/test_{op}.py" for op in baton_kernels.ops.__all__), file=open("op_tests", "w"))
print("torch", torch.__version__, "with CUDA", torch.version.cuda, "and", info["cuda"], file=open("about", "w"))
print(info["cpu"]["isa_used"])
PYTHON
)
cat about
test() { "$cuda_python" -m pytest --rootdir=. --import-mode=importlib -q "$@"; }
test tests/cuda/test_cuda_library.py
# The machine code of every kernel for every architecture.
test tests/cuda/test_cuda_static.py -k library
# The CPU's ops beside this torch, on its best instruction set.
test --backend "cpu-$used" $(cat op_tests)
echo "make test-cuda-build: done in $SECONDS seconds"
