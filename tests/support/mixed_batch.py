"""Rows of three lengths in one packed batch."""

import torch

from baton_engines.llama.packed_batch import PackedBatch


def mixed_batch(llama: object) -> tuple[torch.Tensor, PackedBatch, object]:
    """Two prefills and one decode token, in a cache that already holds the latter's prompt."""
    cache = llama.new_cache(4, 32)
    slots = [cache.allocate(length) for length in (6, 4, 9)]
    first = PackedBatch.from_shape(cache.shape, [1], [4])
    llama.forward(torch.arange(4), first, cache, logits="none")
    cache.extend([1])
    batch = PackedBatch.from_shape(cache.shape, slots, [6, 1, 9])
    return torch.arange(16, dtype=torch.int32), batch, cache
