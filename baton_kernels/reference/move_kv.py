import torch


def move_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    source_slots: torch.Tensor | None = None,
    source_starts: torch.Tensor | None = None,
    target_slots: torch.Tensor | None = None,
    target_starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """``cache[target_slots[i], :, target_starts[i] + t]`` gets what was at the source of move i.

    Every source is read before any target is written.
    """
    assert lengths is not None
    rows, zeros = torch.arange(len(lengths)), torch.zeros_like(lengths)
    moves = [
        (default if index is None else index).tolist()
        for index, default in (
            (source_slots, rows),
            (source_starts, zeros),
            (target_slots, rows),
            (target_starts, zeros),
            (lengths, zeros),
        )
    ]
    scales = [scale.unsqueeze(-1) for scale in (key_scale, value_scale) if scale is not None]
    for cache in (key_cache, value_cache, *scales):
        columns = [
            cache[..., source_slot, :, source_start : source_start + length, :].clone()
            for source_slot, source_start, _, _, length in zip(*moves, strict=True)
        ]
        for i, (_, _, slot, start, length) in enumerate(zip(*moves, strict=True)):
            cache[..., slot, :, start : start + length, :] = columns[i]
