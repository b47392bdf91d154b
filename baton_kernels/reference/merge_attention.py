import torch


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(exp(lse_a) out_a + exp(lse_b) out_b) / total`` and ``log(total)``.

    ``total = exp(lse_a) + exp(lse_b)``. A part whose lse is -inf has seen nothing and is not read.
    """
    peak = torch.maximum(lse_a, lse_b)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - peak), torch.exp(lse_b - peak)
    total = weight_a + weight_b
    out = torch.zeros_like(out_a, dtype=torch.promote_types(out_a.dtype, lse_a.dtype))
    for part, weight in ((out_a, weight_a), (out_b, weight_b)):
        share = (weight / total)[..., None]
        out = out + torch.where(weight[..., None] > 0, part * share, 0.0)
    return out.to(out_a.dtype), peak + torch.log(total)
