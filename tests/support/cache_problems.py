"""Shared by the tests of the ops that copy: caches in the middle of a larger memory."""

from collections.abc import Callable

import torch

from baton_kernels.testing import embed


def embedded_cache(
    make: Callable[[tuple[int, ...]], torch.Tensor],
    *,
    layers: tuple[int, ...] = (),
    num_slots: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    columns_first: bool,
    margin: int,
) -> torch.Tensor:
    """A cache whose rows have ``margin`` elements of other memory around them.

    Args:
        make: creates the contents, given a shape.
        columns_first: stored as [slots, capacity, heads, dim] and viewed transposed, like the
            caches of other engines.
    """
    sizes = (capacity, num_kv_heads) if columns_first else (num_kv_heads, capacity)
    shape = (*layers, num_slots, *sizes, head_dim)
    cache = embed(make(shape), [1] * (len(shape) - 1) + [margin])
    return cache.transpose(-3, -2) if columns_first else cache
