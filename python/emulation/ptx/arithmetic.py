"""PTX instructions whose result depends only on operands of the same lane."""

from __future__ import annotations

import numpy as np

from emulation.ptx.instruction import Instruction, Lanes

TYPES = {
    name: np.dtype(kind) for name, kind in {
        "u8": "u1", "b8": "u1", "s8": "i1", "u16": "u2", "b16": "u2", "s16": "i2", "u32": "u4",
        "b32": "u4", "s32": "i4", "f32": "f4", "u64": "u8", "b64": "u8", "s64": "i8", "f64": "f8",
        "f16": "f2",
    }.items()
}  # fmt: skip
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
SIMPLE = {
    **BITWISE, "add": np.add, "sub": np.subtract, "mul": np.multiply, "not": np.bitwise_not,
    "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum, "ex2": np.exp2,
    "lg2": np.log2, "sqrt": np.sqrt, "tanh": np.tanh, "rcp": np.reciprocal,
    "copysign": lambda sign, x: np.copysign(x, sign),
}  # fmt: skip
FLOAT_MIN_MAX = {"min": np.fmin, "max": np.fmax}  # a NaN gives way to a number


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of floats rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def compute(machine: Lanes, x: Instruction) -> np.ndarray:
    """The value that goes into the first operand."""
    inputs = x.operands[1:]
    if x.name == "setp":
        a, b = (machine.get(operand, x.kind) for operand in inputs)
        compare = x.modifiers[0]
        if compare in COMPARE:
            return COMPARE[compare](a, b)
        has_nan = np.isnan(a) | np.isnan(b)
        if compare in ("num", "nan"):
            return has_nan == (compare == "nan")
        # Unordered: also true when one of them is NaN.
        return COMPARE[compare.removesuffix("u")](a, b) | has_nan
    if x.name == "selp":
        a, b = (machine.get(operand, x.kind) for operand in inputs[:2])
        return np.where(machine.bits(inputs[2]), a, b)
    if x.kind == "pred":
        values = [machine.bits(operand).astype(bool) for operand in inputs]
        return ~values[0] if x.name == "not" else BITWISE[x.name](*values)
    if x.name == "cvt":
        return _convert(machine, x)
    if x.name in ("shl", "shr"):
        return _shift(x, machine.get(inputs[0], x.kind), machine.get(inputs[1], "u32"))
    values = [machine.get(operand, x.kind) for operand in inputs]
    dtype = values[0].dtype
    if x.name in ("mul", "mad") and x.modifiers[0] in ("wide", "hi"):
        return _multiply(machine, x, *values[:2])
    if x.name in ("fma", "mad"):
        exact = np.float64 if dtype.kind == "f" else dtype
        a, b, c = (value.astype(exact) for value in values)
        return (a * b + c).astype(dtype)
    if x.name in ("div", "rem"):
        return _divide(x.name, *values)
    if x.name == "prmt":
        return _permute(*values)
    if x.name in _BITS:
        return _BITS[x.name](*values)
    if dtype.kind == "f" and x.name in FLOAT_MIN_MAX:
        return FLOAT_MIN_MAX[x.name](*values)
    if x.name in SIMPLE:
        return SIMPLE[x.name](*values).astype(dtype)
    raise NotImplementedError(x.opcode)


def _convert(machine: Lanes, x: Instruction) -> np.ndarray:
    to, source = x.modifiers[-2:]
    if source == "bf16":
        return from_bfloat16(machine.bits(x.operands[1]))
    values = [machine.get(operand, source) for operand in x.operands[1:]]
    if to in ("bf16", "bf16x2"):
        parts = [to_bfloat16(value) for value in values]
    elif to == "f16x2":
        parts = [value.astype(np.float16).view(np.uint16) for value in values]
    elif values[0].dtype.kind == "f" and to[0] in "us":
        raise NotImplementedError(x.opcode)
    else:
        return values[0].astype(TYPES[to])
    if len(parts) == 1:
        return parts[0]
    high, low = (part.astype(np.uint32) for part in parts)
    return high << np.uint32(16) | low


def _shift(x: Instruction, value: np.ndarray, amount: np.ndarray) -> np.ndarray:
    bits = value.dtype.itemsize * 8
    last = np.minimum(amount, bits - 1).astype(value.dtype)
    if x.name == "shl":
        shifted = np.left_shift(value, last)
    else:
        shifted = np.right_shift(value, last)
        if value.dtype.kind == "i":
            return shifted  # filled with the sign, however far
    return np.where(amount < bits, shifted, 0).astype(value.dtype)


def _multiply(machine: Lanes, x: Instruction, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.itemsize == 8:
        high = np.broadcast_to(a.astype(object) * b.astype(object) >> 64, machine.count)
        return np.array([int(x) & (1 << 64) - 1 for x in high], np.uint64).view(a.dtype)
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    product = a.astype(wide) * b.astype(wide)
    if x.modifiers[0] == "hi":
        return (product >> wide.type(8 * a.itemsize)).astype(a.dtype)
    if x.name == "mad":
        kind = x.kind[0] + str(8 * wide.itemsize)
        product = product + machine.get(x.operands[3], kind)
    return product


def _divide(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // b
    # Towards zero, where numpy rounds down.
    quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return quotient if name == "div" else a - quotient * b


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        choice = selector >> np.uint32(4 * i) & np.uint32(15)
        if (choice > 7).any():
            raise NotImplementedError("prmt that replicates signs")
        byte = both >> choice.astype(np.uint64) * np.uint64(8) & np.uint64(255)
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _insert(a, b, position, length) -> np.ndarray:
    """bfi: the low bits of a into b."""
    field = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1) << position.astype(np.uint64)
    moved = a.astype(np.uint64) << position.astype(np.uint64)
    return (moved & field | b.astype(np.uint64) & ~field).astype(np.uint32)


def _extract(a, position, length) -> np.ndarray:
    """bfe: a field, with its sign where numbers have one."""
    shift = (64 - length.astype(np.int64) - position.astype(np.int64)).astype(np.uint64)
    kind = np.int64 if a.dtype.kind == "i" else np.uint64
    field = (a.astype(np.uint64) << shift).astype(kind)
    return (field >> (64 - length.astype(np.int64)).astype(kind)).astype(a.dtype)


def _reverse(x: np.ndarray) -> np.ndarray:
    result = np.zeros_like(x)
    for i in range(32):
        result |= (x >> np.uint32(i) & np.uint32(1)) << np.uint32(31 - i)
    return result


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    """bfind.shiftamt: how far the highest bit is from the top, or all ones."""
    highest = np.frexp(x.astype(np.float64))[1] - 1
    return np.where(x == 0, 0xFFFFFFFF, 31 - highest).astype(np.uint32)


def _count_ones(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(x.view(np.uint8).reshape(*x.shape, 4), axis=-1).sum(-1, dtype=np.uint32)


_BITS = {
    "bfi": _insert,
    "bfe": _extract,
    "brev": _reverse,
    "bfind": _leading_zeros,
    "popc": _count_ones,
}
