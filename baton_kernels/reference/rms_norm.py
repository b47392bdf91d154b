import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``s / sqrt(mean(s**2) + eps) * weight`` with ``s = x + residual``; with a residual also s."""
    s = x if residual is None else x + residual
    y = s * torch.rsqrt((s * s).mean(dim=-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, s)
