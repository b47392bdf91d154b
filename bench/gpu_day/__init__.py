"""Checks and measurements for a few minutes on a GPU: `python -m bench.gpu_day`; docs/gpu.md."""
