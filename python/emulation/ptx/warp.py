"""PTX instructions that the lanes of a warp execute together.

Fragment layouts are the formulas of the PTX manual ("Matrix multiply-accumulate operation using
mma instruction"), with its names: groupID = lane / 4, threadID_in_group = lane % 4.
"""

from __future__ import annotations

import re

import numpy as np

from emulation.ptx.arithmetic import from_bfloat16
from emulation.ptx.instruction import Instruction, Lanes

LANE = np.arange(32)
GROUP, IN_GROUP = LANE >> 2, LANE % 4


def registers(operand: str) -> list[str]:
    return re.findall(r"[%\w]+", operand)


def _absent(machine: Lanes, mask: np.ndarray, members: str | None) -> np.ndarray:
    """Per warp, whether a lane that an instruction names does not execute it with the others."""
    warps = mask.reshape(-1, 32)
    named = np.full(len(warps), 0xFFFFFFFF, np.uint32)
    if members is not None:
        of_lanes = np.broadcast_to(machine.get(members, "u32"), machine.count)
        named = np.bitwise_or.reduce(np.where(mask, of_lanes, 0).reshape(-1, 32), axis=1)
    missing = named[:, None] >> LANE.astype(np.uint32) & np.uint32(1) & ~warps
    return missing.any(1) & warps.any(1)


def incomplete(machine: Lanes, x: Instruction, mask: np.ndarray) -> np.ndarray:
    """Lanes of a mask that an instruction keeps waiting for others of their warp."""
    members = x.operands[-1] if x.name in ("shfl", "vote", "bar", "redux") else None
    return mask & np.repeat(_absent(machine, mask, members), 32)


def _together(machine: Lanes, x: Instruction, mask, members=None) -> None:
    """All lanes that an instruction names must execute it at the same time."""
    if mask is not None and _absent(machine, mask, members).any():
        raise RuntimeError(f"{x.opcode} without all of the lanes that it names")


def _shuffle(machine: Lanes, x: Instruction, mask) -> None:
    target, source, lane_operand, clamp, members = x.operands
    _together(machine, x, mask, members)
    lane = machine.lane
    b = machine.get(lane_operand, "u32").astype(np.int64) & 31
    c = machine.get(clamp, "u32").astype(np.int64)
    segment, c = c >> 8 & 31, c & 31
    first, last = lane & segment, (lane & segment) | (c & ~segment)
    mode = x.modifiers[1]
    chosen = {"up": lane - b, "down": lane + b, "bfly": lane ^ b,
              "idx": first | (b & ~segment)}[mode]  # fmt: skip
    inside = chosen >= last if mode == "up" else chosen <= last
    chosen = np.where(inside, chosen, lane)
    value = np.broadcast_to(machine.get(source, "b32"), machine.count)
    register, _, predicate = target.partition("|")
    machine.set(register, value[np.arange(machine.count) - lane + chosen], mask)
    if predicate:
        machine.set(predicate, inside, mask)


def _vote(machine: Lanes, x: Instruction, mask) -> None:
    target, source, members = x.operands
    _together(machine, x, mask, members)
    value = np.broadcast_to(machine.bits(source.lstrip("!")), machine.count)
    value = (~value if source[0] == "!" else value).reshape(-1, 32)
    if mask is not None:
        value = value & mask.reshape(-1, 32)
    if x.modifiers[1] == "ballot":
        result = (value.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
    elif x.modifiers[1] == "any":
        result = value.any(1)
    else:
        raise NotImplementedError(x.opcode)
    machine.set(target, np.repeat(result, 32), mask)


def _reduce(machine: Lanes, x: Instruction, mask) -> None:
    """redux.sync of all lanes of a warp."""
    target, source, members = x.operands
    _together(machine, x, mask, members)
    value = np.broadcast_to(machine.get(source, x.kind), machine.count).reshape(-1, 32)
    if mask is not None and not mask.reshape(-1, 32)[mask.reshape(-1, 32).any(1)].all():
        raise NotImplementedError(f"{x.opcode} of some lanes")
    result = {"min": np.minimum, "max": np.maximum, "add": np.add}[x.modifiers[1]].reduce(value, 1)
    machine.set(target, np.repeat(result.astype(value.dtype), 32), mask)


def _warp_barrier(machine: Lanes, x: Instruction, mask) -> None:
    _together(machine, x, mask, x.operands[0])


def _elements(machine: Lanes, operand: str) -> np.ndarray:
    """Pairs of 16 bits of a lane's registers: [warp, lane, element]."""
    bits = np.stack([machine.get(name, "b32") for name in registers(operand)], -1)
    return bits.view(np.uint16).reshape(-1, 32, 2 * bits.shape[-1])


def elements_as_floats(bits: np.ndarray, kind: str) -> np.ndarray:
    return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16).astype("f4")


def _mma(machine: Lanes, x: Instruction, mask) -> None:
    _together(machine, x, mask)
    shape, a_kind, b_kind = x.modifiers[2], x.modifiers[-3], x.modifiers[-2]
    if x.modifiers[3:5] != ("row", "col") or a_kind != b_kind or x.modifiers[-1] != "f32":
        raise NotImplementedError(x.opcode)
    depth = {"m16n8k8": 8, "m16n8k16": 16}[shape]
    group, in_group = GROUP[:, None], IN_GROUP[:, None]
    # A, [16, depth]: a_i of four or eight elements.
    i = np.arange(depth // 2)
    row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    column = in_group * 2 + (i & 1) + np.where(i < 4, 0, 8)
    a, b = (elements_as_floats(_elements(machine, operand), a_kind) for operand in x.operands[1:3])
    left = np.empty((len(a), 16, depth), np.float32)
    left[:, row, column] = a
    # B, [depth, 8]: b_i of two or four elements.
    i = np.arange(depth // 4)
    right = np.empty((len(b), depth, 8), np.float32)
    right[
        :, in_group * 2 + (i & 1) + np.where(i < 2, 0, 8), np.broadcast_to(group, (32, len(i)))
    ] = b
    product = np.matmul(left, right)
    # C and D, [16, 8]: four floats.
    i = np.arange(4)
    row, column = np.where(i < 2, group, group + 8), in_group * 2 + (i & 1)
    result = product[:, row, column].reshape(-1, 4)
    before = registers(x.operands[3])
    for j, name in enumerate(registers(x.operands[0])):
        machine.set(name, machine.get(before[j], "f32") + result[:, j], mask)


def _fragments(matrix: np.ndarray) -> np.ndarray:
    """An 8x8 matrix of 16 bits as registers: lane 4 r + c has elements 2 c and 2 c + 1 of row r."""
    pair = matrix[..., GROUP[:, None], 2 * IN_GROUP[:, None] + np.arange(2)]
    return np.ascontiguousarray(pair).view(np.uint32)[..., 0]


def _transpose(machine: Lanes, x: Instruction, mask) -> None:
    _together(machine, x, mask)
    elements = _elements(machine, x.operands[1])
    matrix = np.empty((len(elements), 8, 8), np.uint16)
    matrix[:, GROUP[:, None], 2 * IN_GROUP[:, None] + np.arange(2)] = elements
    machine.set(x.operands[0], _fragments(matrix.swapaxes(1, 2)).reshape(-1), mask)


def _load_matrix(machine: Lanes, x: Instruction, mask) -> None:
    _together(machine, x, mask)
    names = registers(x.operands[0])
    # Lanes 8 k to 8 k + 7 name the rows of matrix k.
    naming = machine.lane < 8 * len(names)
    active = naming if mask is None else naming & mask
    rows = machine.memory.shared_rows(x.operands[1], active).reshape(-1, 4, 8, 8)
    for k, name in enumerate(names):
        matrix = rows[:, k]
        if "trans" in x.modifiers:
            matrix = matrix.swapaxes(1, 2)
        machine.set(name, _fragments(matrix).reshape(-1), mask)


INSTRUCTIONS = {
    "shfl": _shuffle, "vote": _vote, "bar": _warp_barrier, "mma": _mma, "movmatrix": _transpose,
    "ldmatrix": _load_matrix, "redux": _reduce,
}  # fmt: skip
