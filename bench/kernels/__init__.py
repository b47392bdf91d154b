"""Kernels against the machine's limits and against peers; see `__main__`."""
