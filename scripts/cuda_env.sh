# Sourced: makes the environment $CUDA_VENV with a CUDA torch, for scripts/cuda_build.sh and gpu.sh.
# Leaves its python in $cuda_python and its pip in $cuda_pip.
CUDA_TORCH=2.14.1
cuda_python=$CUDA_VENV/bin/python
test -x "$cuda_python" || "${PYTHON:-python3}" -m venv "$CUDA_VENV"
cuda_python=$(realpath -s "$cuda_python")
cuda_pip() { "$cuda_python" -m pip --disable-pip-version-check --quiet "$@"; }
# The other environment's torch is an older one without CUDA.
grep -v '^\(torch\|triton\)==' constraints.txt > "$CUDA_VENV/constraints.txt"
cuda_pip install -c "$CUDA_VENV/constraints.txt" "torch==$CUDA_TORCH" setuptools cmake ninja numpy \
  pytest hypothesis psutil nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
# The machine's nvcc, else PyPI's.
command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || \
  cuda_pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* \
    nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*
