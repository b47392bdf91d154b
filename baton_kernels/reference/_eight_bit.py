import torch


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements of ``dtype`` (int8 or float8_e4m3fn) and a float32 scale for each last dimension.

    ``scale = max |x| / top``, ``element = round(x / scale)`` in float32, ties to even. Both are 0
    where the scale is below the smallest normal number; where x is not finite, the scale is NaN.
    """
    top = 127.0 if dtype == torch.int8 else 448.0
    x = x.float()
    is_finite = x.isfinite().all(dim=-1)
    scale = x.abs().amax(dim=-1) / top
    is_zero = ~is_finite | (scale < torch.finfo(torch.float32).smallest_normal)
    ratio = x / scale.masked_fill(is_zero, 1.0)[..., None]
    ratio = ratio.clamp(-top, top).masked_fill(is_zero[..., None], 0.0)
    elements = ratio.round().to(dtype) if dtype == torch.int8 else ratio.to(dtype)
    return elements, scale.masked_fill(is_zero, 0.0).masked_fill(~is_finite, float("nan"))


def dequantize(elements: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``element * scale`` in the scale's dtype, rounded to ``dtype``."""
    return (elements.to(scale.dtype) * scale[..., None]).to(dtype)


def as_they_are(elements: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``[..., head_dim + 4]``: the elements of a token and head, then the bytes of their scale."""
    scales = scale.float()[..., None].contiguous().view(torch.int8)
    return torch.cat((elements.view(torch.int8), scales), dim=-1).view(elements.dtype)


def from_tokens(x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The contents of an eight-bit cache for tokens that are floats, or elements with scales."""
    if x.dtype != cache.dtype:
        return quantize(x, cache.dtype)
    size = cache.shape[-1]
    scale = x[..., size:].contiguous().view(torch.int8).view(torch.float32)
    return x[..., :size], scale[..., 0]
