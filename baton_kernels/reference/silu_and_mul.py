import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``a / (1 + exp(-a)) * b`` with a, b the two halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return a * torch.sigmoid(a) * b
