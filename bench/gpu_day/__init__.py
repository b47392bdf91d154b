"""Everything that a few minutes of a GPU are for: `python -m bench.gpu_day`; see docs/gpu.md."""
