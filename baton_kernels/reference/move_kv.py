import torch


def move_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    source_slots: torch.Tensor,
    source_starts: torch.Tensor,
    target_slots: torch.Tensor,
    target_starts: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """``cache[target_slots[i], :, target_starts[i] + t]`` is what stood at the source of move i.

    Every source is read before any target is written.
    """
    moves = [
        index.tolist()
        for index in (source_slots, source_starts, target_slots, target_starts, lengths)
    ]
    for cache in (key_cache, value_cache):
        columns = [
            cache[..., source_slot, :, source_start : source_start + length, :].clone()
            for source_slot, source_start, _, _, length in zip(*moves, strict=True)
        ]
        for i, (_, _, slot, start, length) in enumerate(zip(*moves, strict=True)):
            cache[..., slot, :, start : start + length, :] = columns[i]
