#!/usr/bin/env bash
# Builds the package with its CUDA kernels beside a CUDA torch, installs it, and tests what can be
# tested without a GPU, away from the sources.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/cuda_env.sh
BATON_CUDA=1 cuda_pip install --no-build-isolation --no-deps --force-reinstall .
tests=$PWD/tests
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$tests"/conftest.py "$tests"/device_ops.py "$tests"/cuda_tools.py "$tests"/op_tables.py \
  "$tests"/emulation "$tests"/test_cuda_library.py "$work"
cd "$work"
used=$("$cuda_python" - <<'PYTHON'
import torch
import baton_kernels

info = baton_kernels.build_info()
print(*(f"test_{op}.py" for op in baton_kernels.ops.__all__), file=open("op_tests", "w"))
print("torch", torch.__version__, "with CUDA", torch.version.cuda, "and", info["cuda"], file=open("about", "w"))
print(info["cpu"]["isa_used"])
PYTHON
)
cat about
cp $(sed "s#test_#$tests/test_#g" op_tests) .
"$cuda_python" -m pytest --import-mode=importlib -q test_cuda_library.py
# The CPU's ops beside this torch, on its best instruction set.
"$cuda_python" -m pytest --import-mode=importlib -q --backend "cpu-$used" $(cat op_tests)
echo "make test-cuda-build: done in $SECONDS seconds"
