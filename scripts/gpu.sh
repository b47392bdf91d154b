#!/usr/bin/env bash
# Builds the package with its CUDA kernels on a machine with a GPU, then runs `bench.gpu_day`, whose
# arguments these are. GPU_PYTHON names an environment that has a CUDA torch, the extras `engines`
# and `dev` of pyproject.toml, setuptools, cmake and ninja already; else one is made.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! nvidia-smi -L 2>/dev/null; then
  echo "make gpu: needs an NVIDIA GPU, and nvidia-smi finds none; nothing was built or run" >&2
  exit 1
fi
# nvcc's intermediate files: another nvcc on this machine may use the same names.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
if [ -n "${GPU_PYTHON:-}" ]; then
  cuda_python=$GPU_PYTHON
else
  . scripts/cuda_env.sh
  # Triton came with torch.
  cuda_pip install -c "$CUDA_VENV/constraints.txt" transformers accelerate gguf rich typer \
    matplotlib pybind11 nvidia-cuda-nvdisasm pytest-xdist pytest-timeout
fi
BATON_CUDA=1 "$cuda_python" -m pip install --quiet --no-build-isolation --no-deps -e .
"$cuda_python" -m bench.gpu_day --minutes "${MINUTES:-15}" --carried /nowhere "$@"
