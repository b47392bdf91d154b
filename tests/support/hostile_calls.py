"""Random calls of `torch.ops.baton_kernels`: valid and invalid ones.

``draw_call(random)`` gives an overload and a description of each argument. It begins with a valid
call and then spoils up to three arguments: shape, strides, dtype, device, values, memory shared
with another argument, None, an object of another class. Every draw uses the given
``random.Random``, so a seed determines a call.
"""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PACKED = (*FLOATS, torch.int8)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
OTHER_DTYPES = (
    torch.float64, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.int32, torch.float8_e4m3fn, *FLOATS,
)  # fmt: skip
HUGE = (-1, -(2**31), 2**31 - 1, 2**30, 65536, -2)
HUGE_SCALARS = (-1, 0, 2**31, 2**62, -(2**63), 2**63 - 1)
FLOAT_SCALARS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e300, 1e-300, 1e39)
LAYOUTS = ("dense", "dense", "gaps", "permuted")


@dataclasses.dataclass
class Described:
    """A tensor that has yet to be placed in memory."""

    shape: list[int]
    dtype: torch.dtype
    values: list[int] | None = None  # of an index tensor; a float tensor's are random
    layout: str = "dense"
    at_end: bool = True  # the last byte borders on a guard page, else the first
    device: str = "cpu"
    # Another argument's name, and the offset at which this one begins in its memory, in bytes.
    inside: tuple[str, int] | None = None
    stored: str = "plain"  # or sparse, negated: what else torch calls a tensor


Arguments = dict[str, Any]


def _heads(r: Random) -> tuple[int, int]:
    return r.choice((1, 1, 2, 3)), r.choice((16, 16, 24, 32, 40, 64, 128))


def _caches(r: Random, layers: bool) -> tuple[list[int], Arguments]:
    heads, dim = _heads(r)
    shape = [r.randrange(1, 5), heads, r.choice((0, 1, 3, 8, 8, 8, 17, 33)), dim]
    if layers:
        shape = [r.randrange(0, 3), *shape]
    dtype, layout, at_end = r.choice(FLOATS), r.choice(LAYOUTS), r.random() < 0.8
    if r.random() < 0.3:
        dtype = r.choice(EIGHT_BITS)
    both = {
        name: Described(list(shape), dtype, layout=layout, at_end=at_end)
        for name in ("key_cache", "value_cache")
    }
    return shape, both


def _scales(r: Random, shape: list[int], caches: Arguments) -> tuple[torch.dtype, Arguments]:
    """The float dtype of the call, and the scales if the caches have an eight-bit type."""
    dtype = caches["key_cache"].dtype
    if dtype not in EIGHT_BITS:
        return dtype, {}
    layout = r.choice(LAYOUTS)
    names = ("key_scale", "value_scale")
    scales = {name: Described(shape[:-1], torch.float32, layout=layout) for name in names}
    return r.choice(FLOATS), scales


def _index(values: list[int]) -> Described:
    return Described([len(values)], torch.int32, values)


def _cuts(r: Random, total: int, rows: int) -> list[int]:
    inner = sorted(r.randrange(total + 1) for _ in range(max(rows - 1, 0)))
    return [0, *inner, total] if rows else [0]


def _rows_in(r: Random, slots: int, capacity: int, distinct: bool) -> tuple[list[int], ...]:
    """Slots, starts and lengths that fit."""
    rows = r.randrange(0, slots + 1 if distinct else slots + 3)
    chosen = r.sample(range(slots), rows) if distinct else [r.randrange(slots) for _ in range(rows)]
    lengths = [r.randrange(capacity + 1) for _ in chosen]
    starts = [r.randrange(capacity - n + 1) for n in lengths]
    return chosen, starts, lengths


def _tokens(shape: list[int], total: int, dtype: torch.dtype, r: Random) -> Described:
    *layers, _, heads, _, dim = shape
    dim += 4 if dtype in EIGHT_BITS else 0  # as they are in a cache, with their scales
    return Described([*layers, total, heads, dim], dtype, layout=r.choice(LAYOUTS))


def insert_kv(r: Random) -> tuple[str, Arguments]:
    shape, caches = _caches(r, r.random() < 0.4)
    slots, starts, lengths = _rows_in(r, shape[-4], shape[-2], True)
    total, (dtype, scales) = sum(lengths), _scales(r, shape, caches)
    if scales and r.random() < 0.5:
        dtype = caches["key_cache"].dtype
    return "scaled" if scales else "default", {
        "key": _tokens(shape, total, dtype, r), "value": _tokens(shape, total, dtype, r), **caches,
        "cu_seqlens": _index([sum(lengths[:i]) for i in range(len(lengths) + 1)]),
        "slots": _index(slots), "starts": _index(starts), "zero_padding": r.random() < 0.3,
        **scales,
    }  # fmt: skip


def append_kv(r: Random) -> tuple[str, Arguments]:
    shape, caches = _caches(r, False)
    capacity, dim = shape[-2:]
    slots = r.sample(range(shape[0]), r.randrange(shape[0] + 1)) if capacity else []
    rows, (floats, scales) = len(slots), _scales(r, shape, caches)
    arguments = {
        "key": _tokens(shape, rows, floats, r), "value": _tokens(shape, rows, floats, r), **caches,
        "slots": _index(slots), "columns": _index([r.randrange(capacity) for _ in slots]),
    }  # fmt: skip
    overload = r.choice(("scaled", "scaled_query") if scales else ("default", "query"))
    if overload.endswith("query"):
        arguments["query"] = Described([rows, r.randrange(1, 5), dim], floats)
    if r.random() < 0.5:
        wide, dtype = r.choice((dim, dim // 2)), r.choice((torch.float32, floats))
        arguments |= {name: Described([rows, wide], dtype) for name in ("cos", "sin")}
    elif scales:  # in these overloads it takes a None to leave them out
        arguments |= {"cos": None, "sin": None}
    return overload, arguments | scales


def move_kv(r: Random) -> tuple[str, Arguments]:
    shape, caches = _caches(r, r.random() < 0.4)
    slots, starts, lengths = _rows_in(r, shape[-4], shape[-2], True)
    targets = list(slots)
    r.shuffle(targets)
    if r.random() < 0.5:
        targets = slots  # each within its slot
    fits = [r.randrange(shape[-2] - n + 1) for n in lengths]
    _, scales = _scales(r, shape, caches)
    return "scaled" if scales else "default", {
        **caches, **scales, "source_slots": _index(slots), "source_starts": _index(starts),
        "target_slots": _index(targets), "target_starts": _index(fits), "lengths": _index(lengths),
    }  # fmt: skip


def extract_kv(r: Random) -> tuple[str, Arguments]:
    shape, caches = _caches(r, r.random() < 0.4)
    slots, starts, lengths = _rows_in(r, shape[-4], shape[-2], False)
    total = sum(lengths)
    dtype, scales = _scales(r, shape, caches)
    as_they_are = scales and r.random() < 0.5
    arguments = {
        **caches, "cu_seqlens": _index([sum(lengths[:i]) for i in range(len(lengths) + 1)]),
        "slots": _index(slots), "starts": _index(starts), "total_tokens": total, **scales,
    }  # fmt: skip
    overload = r.choice(("scaled", "scaled_out") if scales else ("default", "out"))
    if overload.endswith("out"):
        dtype = caches["key_cache"].dtype if as_they_are else dtype
        for name in ("key", "value"):
            arguments[name] = _tokens(shape, total, dtype, r)
    elif scales:
        arguments["dtype"] = None if as_they_are else dtype
    return overload, arguments


def ragged_attention(r: Random) -> tuple[str, Arguments]:
    shape, caches = _caches(r, False)
    slots, starts, lengths = _rows_in(r, shape[0], shape[2], False)
    columns, paged = shape[2], {}
    if r.random() < 0.3 and shape[2]:
        pages = r.randrange(1, 4)
        columns = pages * shape[2]
        lengths = [r.randrange(columns + 1) for _ in slots]
        starts = [r.randrange(columns - n + 1) for n in lengths]
        table = [r.randrange(shape[0]) for _ in range(len(slots) * pages)]
        paged = {"block_table": Described([len(slots), pages], torch.int32, table)}
    total = r.randrange(0, 9) if slots else 0
    heads = shape[1] * r.randrange(1, 4)
    dtype, scales = _scales(r, shape, caches)
    query = Described([total, heads, shape[3]], dtype, layout=r.choice(LAYOUTS))
    arguments = {
        "query": query, **caches, "cu_seqlens_q": _index(_cuts(r, total, len(slots))),
        "slots": _index(slots), "starts": _index(starts), "lengths": _index(lengths),
    }  # fmt: skip
    overload = r.choice(("options" if scales else "default", "options", "lse", "out", "lse_out"))
    if overload != "default":
        options = {
            "scale": r.choice((None, 0.5, 0.0)), "causal": r.random() < 0.8,
            "window": r.choice((None, None, 1, 3, 100)), "softcap": r.choice((0.0, 20.0)),
            "alibi_slopes": r.choice((None, Described([heads], torch.float32))),
            "sinks": r.choice((None, Described([heads], torch.float32))),
            "max_query_length": r.choice((None, total)), "max_length": r.choice((None, columns)),
            **paged, **scales,
        }  # fmt: skip
        arguments |= options
    if overload.endswith("out"):
        arguments["out"] = Described([total, heads, shape[3]], query.dtype)
    if overload == "lse_out":
        arguments["lse"] = Described([total, heads], torch.float32)
    return overload, arguments


def merge_attention(r: Random) -> tuple[str, Arguments]:
    heads, dim = _heads(r)
    shape = [r.randrange(6), heads, r.choice((dim, 1, 7))]
    dtype = r.choice(FLOATS)
    return "default", {
        "out_a": Described(list(shape), dtype, layout=r.choice(LAYOUTS)),
        "lse_a": Described(shape[:2], torch.float32),
        "out_b": Described(list(shape), dtype, layout=r.choice(LAYOUTS)),
        "lse_b": Described(shape[:2], torch.float32),
    }  # fmt: skip


def _masked(r: Random) -> tuple[int, Arguments]:
    keys = r.randrange(0, 20)
    lengths = [r.randrange(keys + 1) for _ in range(r.randrange(5))]
    starts = [r.randrange(keys - n + 1) for n in lengths]
    rows = {"starts": _index(starts), "lengths": _index(lengths)}
    return keys, rows | {"window": r.choice((None, 1, 4))}


def attention_mask(r: Random) -> tuple[str, Arguments]:
    keys, rows = _masked(r)
    dtype = r.choice((torch.bool, *FLOATS))
    return "default", {"query_length": r.randrange(6), "key_length": keys, "dtype": dtype, **rows}


def masked_softmax(r: Random) -> tuple[str, Arguments]:
    keys, rows = _masked(r)
    shape = [rows["lengths"].shape[0], r.randrange(3), r.randrange(6), keys]
    scores = Described(shape, r.choice(FLOATS), layout=r.choice(LAYOUTS))
    return "default", {"scores": scores, "scale": r.choice((1.0, 0.3)), **rows}


def rms_norm(r: Random) -> tuple[str, Arguments]:
    rows, size, dtype = r.randrange(5), r.choice((1, 7, 16, 65, 128)), r.choice(FLOATS)
    x = {"x": Described([rows, size], dtype, layout=r.choice(LAYOUTS))}
    arguments = x | {"weight": Described([size], dtype), "eps": 1e-5}
    overload = r.choice(("default", "residual"))
    if overload == "residual":
        arguments["residual"] = Described([rows, size], dtype, layout=r.choice(LAYOUTS))
    return overload, arguments


def silu_and_mul(r: Random) -> tuple[str, Arguments]:
    shape = [r.randrange(5), 2 * r.choice((0, 1, 9, 32, 65))]
    return "default", {"x": Described(shape, r.choice(FLOATS), layout=r.choice(LAYOUTS))}


def likeliest(r: Random) -> tuple[str, Arguments]:
    shape = [r.randrange(5), r.choice((1, 7, 16, 65, 600))]
    return "default", {"logits": Described(shape, r.choice(FLOATS), layout=r.choice(LAYOUTS))}


def linear(r: Random) -> tuple[str, Arguments]:
    rows, wide, outputs = (
        r.choice((0, 1, 2, 5, 18)),
        r.choice((0, 1, 7, 33, 64)),
        r.randrange(0, 60),
    )
    dtype = r.choice(FLOATS)
    arguments = {
        "x": Described([rows, wide], dtype, layout=r.choice(LAYOUTS)),
        "weight": Described([outputs, wide], dtype, layout=r.choice(LAYOUTS)),
    }
    return "default", arguments | _bias(r, outputs, dtype)


def _bias(r: Random, outputs: int, dtype: torch.dtype) -> Arguments:
    return {"bias": Described([outputs], dtype)} if r.random() < 0.5 else {}


def _panels(outputs: int, wide: int, dtype: torch.dtype) -> Described:
    panels = -(-outputs // 48)
    if dtype == torch.int8:
        return Described([panels, -(-wide // 4), 48, 4], dtype)
    if dtype == torch.bfloat16:
        return Described([panels, -(-wide // 2), 48, 2], dtype)
    return Described([panels, wide, 48], dtype)


def linear_packed(r: Random) -> tuple[str, Arguments]:
    rows, wide, outputs = r.choice((0, 1, 2, 5, 18)), r.choice((0, 1, 7, 33)), r.randrange(0, 110)
    dtype, overload = r.choice(FLOATS), r.choice(("default", "int8"))
    arguments = {"x": Described([rows, wide], dtype, layout=r.choice(LAYOUTS))}
    if overload == "int8":
        arguments["panels"] = _panels(outputs, wide, torch.int8)
        arguments["scales"] = Described([outputs], torch.float32)
    else:
        arguments["panels"] = _panels(outputs, wide, dtype)
    return overload, arguments | {"out_features": outputs, **_bias(r, outputs, dtype)}


def quantize_linear(r: Random) -> tuple[str, Arguments]:
    shape = [r.randrange(0, 110), r.choice((0, 1, 7, 33))]
    return "default", {"weight": Described(shape, r.choice(FLOATS), layout=r.choice(LAYOUTS))}


def pack_linear(r: Random) -> tuple[str, Arguments]:
    wide, outputs, dtype = r.choice((0, 1, 7, 33)), r.randrange(0, 110), r.choice(PACKED)
    weight = Described([outputs, wide], dtype, layout=r.choice(LAYOUTS))
    return "default", {"weight": weight, "panels": _panels(outputs, wide, dtype)}


def unpack_linear(r: Random) -> tuple[str, Arguments]:
    wide, outputs, dtype = r.choice((0, 1, 7, 33)), r.randrange(0, 110), r.choice(PACKED)
    arguments = {
        "panels": _panels(outputs, wide, dtype), "out_features": outputs, "in_features": wide,
    }  # fmt: skip
    if r.random() < 0.5 and outputs:
        arguments["outputs"] = _index([r.randrange(outputs) for _ in range(r.randrange(5))])
    return "default", arguments


OPS = {
    f.__name__: f
    for f in (
        insert_kv, append_kv, move_kv, extract_kv, ragged_attention, merge_attention,
        attention_mask, masked_softmax, rms_norm, silu_and_mul, likeliest, linear,
        linear_packed,
        quantize_linear, pack_linear, unpack_linear,
    )
}  # fmt: skip


def _spoil_shape(r: Random, tensor: Described) -> None:
    how, shape = r.randrange(6), tensor.shape
    if how == 0 and shape:
        shape.pop(r.randrange(len(shape)))
    elif how == 1:
        shape.insert(r.randrange(len(shape) + 1), r.choice((0, 1, 2)))
    elif shape:
        place = r.randrange(len(shape))
        shape[place] = r.choice(
            (0, 1, shape[place] + 1, shape[place] * 2, max(shape[place] - 1, 0))
        )
    if tensor.values is not None:
        count = 1
        for size in shape:
            count *= size
        tensor.values = (tensor.values + [0] * count)[:count]


def _spoil_values(r: Random, tensor: Described) -> None:
    values = tensor.values
    if not values:
        _spoil_shape(r, tensor)
        return
    how, place = r.randrange(4), r.randrange(len(values))
    if how == 0:
        values[place] = r.choice(HUGE)
    elif how == 1:
        values[place] += r.choice((-1, 1, 7))
    elif how == 2:
        values.reverse()
    else:
        values[place] = values[r.randrange(len(values))]


def _spoil(r: Random, arguments: Arguments) -> None:
    name = r.choice(list(arguments))
    value = arguments[name]
    if not isinstance(value, Described):
        if isinstance(value, float):
            arguments[name] = r.choice((*FLOAT_SCALARS, "text"))
        elif isinstance(value, torch.dtype):
            arguments[name] = r.choice(OTHER_DTYPES)
        else:
            arguments[name] = r.choice((*HUGE_SCALARS, None, "text", 1.5))
        return
    how = r.randrange(16)
    if how < 3:
        _spoil_shape(r, value)
    elif how < 5:
        value.dtype = r.choice(OTHER_DTYPES)
    elif how < 7:
        value.layout = r.choice(("gaps", "permuted", "expanded", "every_second", "overlapping"))
    elif how < 10:
        _spoil_values(r, value)
    elif how < 13:
        others = [k for k, v in arguments.items() if isinstance(v, Described) and k != name]
        if others:
            other = r.choice(others)
            step = value.dtype.itemsize
            value.inside = other, r.choice((0, 0, step, -step, 64, 256, 2, 4 * r.randrange(300)))
    elif how == 13:
        value.device = "meta"
    elif how == 14:
        value.stored = r.choice(("sparse", "negated", "nested", "without storage"))
    else:
        arguments[name] = r.choice((None, 3, "text", [1, 2]))


def draw_call(r: Random) -> tuple[str, str, Arguments]:
    """An op, an overload and its arguments by name."""
    op = r.choice(list(OPS))
    overload, arguments = OPS[op](r)
    for optional in (
        "cu_seqlens",
        "cu_seqlens_q",
        "slots",
        "starts",
        "source_slots",
        "target_slots",
    ):
        if optional in arguments and r.random() < 0.08:
            arguments[optional] = None
    for value in arguments.values():
        if isinstance(value, Described):
            value.at_end = r.random() < 0.8
    for _ in range(r.choice((0, 0, 1, 1, 1, 2, 3))):
        _spoil(r, arguments)
    if r.random() < 0.02:
        for value in arguments.values():
            if isinstance(value, Described):
                value.device = "meta"
    return op, overload, arguments
