"""Rows in eight-bit caches, and poison in every column that belongs to no row."""

import dataclasses

import torch

from baton_kernels.reference._eight_bit import quantize
from baton_kernels.testing import AttentionProblem, embed

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def poison_eight(x: torch.Tensor) -> torch.Tensor:
    """Fills with a number that no row contains, NaN if the dtype has one."""
    bits = x.view(torch.int8) if x.is_contiguous() else x
    if bits.dtype != torch.int8:
        raise AssertionError("poison before taking a view")
    bits.fill_(-128 if x.dtype == torch.int8 else 0x7F)
    return x


@dataclasses.dataclass
class EightBitProblem:
    """The arguments of ``ragged_attention`` by name, and the dense problem that they came from."""

    dense: AttentionProblem
    arguments: dict[str, torch.Tensor]


def eight_bit_problem(
    dense: AttentionProblem, dtype: torch.dtype, margins: tuple[int, ...] | None = None
) -> EightBitProblem:
    """The rows of a dense problem, quantized in place."""
    arguments = {field.name: getattr(dense, field.name) for field in dataclasses.fields(dense)}
    for name in ("key", "value"):
        cache = arguments[f"{name}_cache"]
        elements = poison_eight(torch.empty(cache.shape, dtype=dtype))
        scales = torch.full(cache.shape[:-1], float("nan"))
        places = zip(
            dense.slots.tolist(), dense.starts.tolist(), dense.lengths.tolist(), strict=True
        )
        for slot, start, length in places:
            place = slot, slice(None), slice(start, start + length)
            elements[place], scales[place] = quantize(cache[place], dtype)
        arguments[f"{name}_cache"] = embed_bits(elements, margins)
        arguments[f"{name}_scale"] = embed(scales, None if margins is None else margins[:-1])
    return EightBitProblem(dense, arguments)


def embed_bits(x: torch.Tensor, margins: tuple[int, ...] | None = None) -> torch.Tensor:
    """`embed`, also for float8."""
    return embed(x.view(torch.int8), margins).view(x.dtype)


def pages_of(problem: EightBitProblem, page: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same rows, their columns in random pages; the other columns are poison."""
    arguments = dict(problem.arguments)
    starts, lengths = arguments["starts"].tolist(), arguments["lengths"].tolist()
    slots = arguments.pop("slots").tolist()
    counts = [-(-(start + length) // page) for start, length in zip(starts, lengths, strict=True)]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(counts), max(counts, default=0) + 1), -(2**31), dtype=torch.int32)
    first = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[first : first + count]
        first += count
    for name in ("key", "value"):
        cache, scales = arguments[f"{name}_cache"], arguments[f"{name}_scale"]
        heads, dim = cache.shape[1], cache.shape[3]
        paged = poison_eight(torch.empty(len(order), heads, page, dim, dtype=cache.dtype))
        paged_scales = torch.full((len(order), heads, page), float("nan"))
        for row, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True)):
            for column in range(start, start + length):
                at = int(table[row, column // page]), slice(None), column % page
                paged[at], paged_scales[at] = cache[slot, :, column], scales[slot, :, column]
        arguments[f"{name}_cache"], arguments[f"{name}_scale"] = paged, paged_scales
    return arguments | {"block_table": table}
