"""CUDA kernels run by the host compiler: see README.md."""
