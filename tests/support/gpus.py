"""Marks of tests that run on GPUs only. `make gpu` runs them: their names begin with `test_gpu`."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU; `make gpu` runs it there"
)
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA GPUs; `make gpu` runs it there"
)
