"""Ops have no backward: a tensor that requires grad is rejected instead of losing its gradient."""

import pytest
import torch

import baton_kernels


def test_a_tensor_that_requires_grad_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="linear: tensors must not require grad"):
        baton_kernels.linear(x, torch.randn(4, 8))
    with pytest.raises(NotImplementedError, match="rms_norm: tensors must not require grad"):
        baton_kernels.rms_norm(torch.randn(3, 8), torch.ones(8), residual=x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_used_where_gradients_are_off(mode):
    x = torch.randn(3, 8, requires_grad=True)
    with mode():
        assert baton_kernels.linear(x, torch.randn(4, 8)).shape == (3, 4)
