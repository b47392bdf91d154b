import torch

# The number of elements in a row of x that share a scale.
GROUP = 64
# Keeps sums of x times 127 within float32.
HEADROOM = 128.0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``."""
    y = x @ weight.T
    return y if bias is None else y + bias


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as int8 and a float32 scale: `round(row / scale)`, the largest magnitude being 127.

    A row that is not finite becomes 0 with scale NaN, a row of nearly 0 becomes 0 with scale 0.
    """
    x = x.float()
    largest = x.abs().amax(1) if x.shape[1] > 0 else x.new_zeros(len(x))
    # A tensor, because torch divides by a number through its reciprocal, which rounds twice.
    most = torch.full_like(largest, 127.0)
    inverse = most / largest
    finite, near_zero = largest.isfinite(), inverse.isinf()
    rounded = (x * inverse[:, None]).round()
    rounded = torch.where((finite & ~near_zero)[:, None], rounded, 0.0)
    scales = torch.where(near_zero, 0.0, largest / most)
    return rounded.to(torch.int8), torch.where(finite, scales, torch.nan)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` with x and weight rounded to int8: a scale per 64 elements of a row of x, and one
    per output. The sums over 64 elements are exact, and are added up in float32 in order.

    Not only the values but also the bits are those of `baton_kernels.linear`, on every CPU.
    """
    outputs, output_scales = quantize_rows(weight)
    y = torch.zeros(len(x), len(weight), device=x.device)
    for group, of_outputs in zip(x.split(GROUP, 1), outputs.split(GROUP, 1), strict=True):
        rows, row_scales = quantize_rows(group)
        # float64 represents every sum exactly.
        sums = (rows.double() @ of_outputs.double().T).float()
        y = y + sums * (row_scales / HEADROOM)[:, None]
    y = y * output_scales * HEADROOM
    return (y if bias is None else y + bias.float()).to(x.dtype)
