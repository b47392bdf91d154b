#!/usr/bin/env bash
# Everything that needs a GPU: builds the CUDA kernels, runs the tests on the device, captures CUDA
# graphs, measures beside what is installed of flash-attn and flashinfer, and last runs the tests
# that need none. GPU_PYTHON names an environment that has a CUDA torch, the extra `engines` of
# pyproject.toml, setuptools, cmake, ninja, pytest, hypothesis, psutil and pybind11 already; else one
# is made.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! nvidia-smi -L 2>/dev/null; then
  echo "make gpu: needs an NVIDIA GPU, and nvidia-smi finds none; nothing was built or run" >&2
  exit 1
fi
if [ -n "${GPU_PYTHON:-}" ]; then
  cuda_python=$GPU_PYTHON
else
  . scripts/cuda_env.sh
  # Triton came with torch; the tables and figures of bench, and what the relay runs.
  cuda_pip install -c "$CUDA_VENV/constraints.txt" transformers accelerate gguf rich typer \
    matplotlib pybind11 nvidia-cuda-nvdisasm
fi
BATON_CUDA=1 "$cuda_python" -m pip install --quiet --no-build-isolation --no-deps -e .
"$cuda_python" - <<'PYTHON'
import sys
import torch
import baton_kernels

info = baton_kernels.build_info()
print("torch", torch.__version__, "CUDA", torch.version.cuda, "and", info["cuda"])
if not torch.cuda.is_available() or info["cuda"]["why_not"]:
    sys.exit("make gpu: torch finds no usable GPU, or the CUDA library is not loaded")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PYTHON
ops=$("$cuda_python" -c 'import baton_kernels
print(*(f"tests/ops/test_{op}.py" for op in baton_kernels.ops.__all__))')
"$cuda_python" -m pytest --backend cuda $ops
"$cuda_python" -m pytest tests/cuda/test_cuda_library.py
"$cuda_python" -m pytest -k test_gpu tests/cuda/test_cuda_graph.py tests/relay/test_relay_exactness.py
"$cuda_python" -m bench.kernels --device cuda --json gpu.json
# The last and the longest: what the device changes for those that do not ask for it.
"$cuda_python" -m pytest
