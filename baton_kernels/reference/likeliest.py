import torch


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """``argmax(logits)`` of each row, or -1 where an element is NaN or infinite."""
    is_finite = torch.isfinite(logits).all(dim=-1)
    return torch.where(is_finite, logits.argmax(dim=-1), -1)
