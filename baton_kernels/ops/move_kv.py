"""move_kv: relocate and realign rows of a KV cache in place."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call, count_rows

_native = ops.move_kv.default
_native_scaled = ops.move_kv.scaled


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
    """Moves runs of columns inside a KV cache, in place, all layers in one call.

    For move i and t in `[0, lengths[i])`, as if the source were read whole before the target is
    written::

        key_cache[target_slots[i], :, target_starts[i] + t] =
            key_cache[source_slots[i], :, source_starts[i] + t]

    A shift right by 2 overlaps its own source, which is safe::

        before   a0 a1 a2 a3  .  .
        after    a0 a1 a0 a1 a2 a3        columns 0 and 1 are padding now

    Args:
        key_cache: `[num_slots, num_kv_heads, capacity, head_dim]`, float32, float16 or bfloat16,
            last dimension contiguous, or with a leading num_layers. Written.
        value_cache: As key_cache. Written.
        source_slots: `[num_moves]`, int32; move i in slot i if None.
        source_starts: `[num_moves]`, int32: first column that is read; 0 if None.
        target_slots: `[num_moves]`, int32; move i in slot i if None.
        target_starts: `[num_moves]`, int32: first column that is written; 0 if None.
        lengths: `[num_moves]`, int32: columns to move. Required.
        key_scale: For eight-bit caches (int8, float8_e4m3fn; CPU only): their scales, which move
            with the elements, float32 `[num_slots, num_kv_heads, capacity]`, or with a leading
            num_layers. Required with such caches, None with others. Written.
        value_scale: As key_scale. Written.

    Raises:
        ValueError: A shape, stride, device or index value does not fit, two targets overlap, a
            target overlaps the source of another move, or a cache shares memory with another
            argument. Nothing is written then.
        TypeError: A dtype is not supported.
        NotImplementedError: head_dim is not a multiple of 8 from 16 to 256, or eight-bit caches are
            not on the CPU.

    On a GPU index values are not checked: moves out of range are skipped, and the result of moves
    that overlap each other is undefined.

    Source: BATON (arXiv 2410.18701), shaping of the running batch and removal of finished rows.
    """
    if key_scale is not None or value_scale is not None:
        given = (
            key_cache, value_cache, source_slots, source_starts, target_slots, target_starts,
            lengths, key_scale, value_scale,
        )  # fmt: skip
        if key_scale is None or value_scale is None:
            check_arguments(*given)
        return call("move_kv", _native_scaled, check_arguments, *given)
    call(
        "move_kv", _native, check_arguments,
        key_cache, value_cache, source_slots, source_starts, target_slots, target_starts, lengths,
    )  # fmt: skip


def check_arguments(
    key_cache, value_cache, source_slots, source_starts, target_slots, target_starts, lengths,
    key_scale=None, value_scale=None,
) -> None:  # fmt: skip
    check = Checker("move_kv")
    check.caches(
        key_cache, value_cache, with_layers=True, written=True, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    check.tensor("lengths", lengths)
    places = {
        "source_slots": source_slots,
        "source_starts": source_starts,
        "target_slots": target_slots,
        "target_starts": target_starts,
    }
    num_moves = count_rows(*places.values(), otherwise=lengths.numel())
    for name, tensor in places.items():
        check.index_or_none(name, tensor, num_moves, key_cache.device)
    check.index("lengths", lengths, num_moves, key_cache.device)


@torch.library.register_fake("baton_kernels::move_kv")
@torch.library.register_fake("baton_kernels::move_kv.scaled")
def _fake(*args) -> None:
    check_arguments(*args)


_fake_scaled = _fake
