#!/usr/bin/env bash
# What a wheel is built with, for the workflow: torch, whose headers are read, and for BATON_CUDA=1
# PyPI's nvcc.
set -euo pipefail
python -m pip install setuptools cmake ninja torch
if [ "${BATON_CUDA:-0}" = 1 ]; then
  python -m pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* \
    nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*
fi
