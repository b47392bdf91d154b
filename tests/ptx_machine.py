"""Runs the PTX that nvcc emits, all threads of a launch at once as numpy vectors.

An independent path to a kernel's results: the emulator trusts the host compiler and its own twins
of PTX instructions, this machine trusts nvcc and the few instructions below. Threads at the lowest
program counter run next, which brings branches together again where they meet. Every executed
instruction is counted once per warp; loads of parameters, which become constant operands, are not.
"""

from __future__ import annotations

import collections
import ctypes
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from cuda_tools import tool

ROOT = Path(__file__).resolve().parent.parent
TYPES = {
    "u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16,
    "s16": np.int16, "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32,
    "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f64": np.float64, "f16": np.float16,
}  # fmt: skip
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal, "neu": np.not_equal, "equ": np.equal, "ltu": np.less,
    "gtu": np.greater, "leu": np.less_equal, "geu": np.greater_equal,
}  # fmt: skip
BITWISE = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def compile_ptx(source: Path, architecture: int) -> str:
    """PTX of a kernel source."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.ptx"
        command = [tool("nvcc"), "-std=c++20", "-O3", "-I", "csrc", f"-arch=sm_{architecture}",
                   "-ptx", str(source), "-o", str(target)]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return target.read_text()


def _sectors(address: np.ndarray, mask: np.ndarray) -> int:
    """Distinct sectors of every warp's lanes; no access is wider than a sector, or crosses one."""
    sector = np.where(mask, (address // np.uint64(32)).astype(np.int64), -1).reshape(-1, 32)
    sector = np.sort(sector[mask.reshape(-1, 32).any(1)], axis=1)
    new = np.diff(sector, axis=1, prepend=-1) != 0
    return int(new.sum())


class Machine:
    """One kernel of a PTX text, by a part of its mangled name."""

    def __init__(self, ptx: str, kernel: str) -> None:
        ptx = re.sub(r"//.*", "", ptx)
        found = re.search(
            rf"\.entry (\w*{kernel}\w*)\((.*?)\)[^{{;]*\{{(.*?)^\}}", ptx, re.DOTALL | re.MULTILINE
        )
        if not found:
            raise KeyError(f"no kernel {kernel} in this PTX")
        self.parameters = re.findall(r"(\w+_param_\d+)", found[2])
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str | None, str, list[str]]] = []
        for statement in re.split(r"[;{}]?\s*\n", found[3]):
            self._add(statement.strip().rstrip(";").strip())
        self.counts: collections.Counter[str] = collections.Counter()
        self.sectors = 0  # of 32 bytes, that the lanes of a warp touch in one load or store

    def _add(self, statement: str) -> None:
        if label := re.match(r"(\$\w+):", statement):
            self.labels[label[1]] = len(self.code)
            return
        statement = statement.lstrip("{ \t")  # inline assembly stands in braces of its own
        if not statement or statement[0] in ".}(":
            return
        guard = re.match(r"@(!?%\w+)\s+", statement)
        if guard:
            statement = statement[guard.end() :]
        opcode, _, rest = statement.partition(" ")
        opcode, _, more = opcode.partition("\t")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", more + " " + rest)
        self.code.append((guard[1] if guard else None, opcode, operands))

    def launch(self, grid, block, arguments: list[bytes], tensors: list[torch.Tensor]) -> None:
        """Runs a launch on the memory of the tensors, which the arguments point into."""
        offsets = np.cumsum([0, *((len(x) + 15) // 16 * 16 for x in arguments)])
        self.offsets = dict(zip(self.parameters, offsets.tolist(), strict=False))
        padded = b"".join(x.ljust((len(x) + 15) // 16 * 16, b"\0") for x in arguments)
        self.constant = np.frombuffer(padded, np.uint8)
        starts = [x.data_ptr() for x in tensors]
        ends = [x.data_ptr() + x.untyped_storage().nbytes() for x in tensors]
        self.base = min(starts) // 16 * 16
        span = (max(ends) - self.base + 15) // 16 * 16
        self.memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.base))
        size = block[0] * block[1] * block[2]
        per_block = (size + 31) // 32 * 32
        blocks = grid[0] * grid[1] * grid[2]
        thread = np.tile(np.arange(per_block, dtype=np.uint64), blocks)
        where = np.repeat(np.arange(blocks, dtype=np.uint64), per_block)
        b, g = np.array(block, dtype=np.uint64), np.array(grid, dtype=np.uint64)
        self.special = {
            "%tid.x": thread % b[0], "%tid.y": thread // b[0] % b[1],
            "%tid.z": thread // (b[0] * b[1]),
            "%ctaid.x": where % g[0], "%ctaid.y": where // g[0] % g[1],
            "%ctaid.z": where // (g[0] * g[1]), "%laneid": thread % np.uint64(32),
        }  # fmt: skip
        for i, axis in enumerate("xyz"):
            self.special[f"%ntid.{axis}"] = np.full_like(thread, block[i])
            self.special[f"%nctaid.{axis}"] = np.full_like(thread, grid[i])
        self.registers: dict[str, np.ndarray] = {}
        self._run(thread < size)

    def _run(self, alive: np.ndarray) -> None:
        end = len(self.code)
        pc = np.where(alive, 0, end)
        self.count = len(pc)
        stops = set(self.labels.values())
        with np.errstate(all="ignore"):
            while (at := int(pc.min())) < end:
                mask = pc == at
                warps = int(mask.reshape(-1, 32).any(1).sum())
                while True:
                    guard, opcode, operands = self.code[at]
                    active = mask
                    if guard:
                        taken = self.registers[guard.lstrip("!")].astype(bool)
                        active = mask & (~taken if guard[0] == "!" else taken)
                    if not opcode.startswith("ld.param"):
                        self.counts[opcode] += warps
                    if opcode.startswith("bra"):
                        pc[mask] = at + 1
                        pc[active] = self.labels[operands[0]]
                        break
                    if opcode in ("ret", "exit"):
                        pc[mask] = at + 1
                        pc[active] = end
                        break
                    self._execute(opcode, operands, active)
                    at += 1
                    if at in stops:
                        pc[mask] = at
                        break

    # Operands. A register holds raw bits in 64-bit words.

    def _bits(self, operand: str) -> np.ndarray:
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("%"):
            return self.registers.setdefault(operand, np.zeros(self.count, np.uint64))
        if operand in self.offsets:
            return np.full(self.count, self.offsets[operand], np.uint64)
        if operand.startswith("0f"):
            return np.full(self.count, int(operand[2:], 16), np.uint64)
        return np.full(self.count, int(operand, 0) & (2**64 - 1), np.uint64)

    def _get(self, operand: str, kind: str) -> np.ndarray:
        negative = operand.startswith("-%")
        bits = self._bits(operand.lstrip("-") if negative else operand)
        dtype = np.dtype(TYPES[kind])
        value = bits.astype(f"u{dtype.itemsize}").view(dtype)
        return -value if negative else value

    def _set(self, operand: str, value: np.ndarray, mask: np.ndarray) -> None:
        if operand == "_":
            return
        raw = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")
        old = self._bits(operand)
        self.registers[operand] = np.where(mask, raw.astype(np.uint64), old)

    def _address(self, operand: str) -> tuple[np.ndarray, int]:
        inside = operand.strip("[]")
        name, _, offset = inside.partition("+")
        return self._bits(name), int(offset or 0)

    def _execute(self, opcode: str, operands: list[str], mask: np.ndarray) -> None:
        name, *modifiers = opcode.split(".")
        kind = modifiers[-1] if modifiers else ""
        target = operands[0]
        if name in ("ld", "st"):
            self._memory(name, modifiers, operands, mask)
        elif name == "mov" and operands[-1].startswith("{"):
            parts = re.findall(r"[%\w]+", operands[1])
            width = 64 // len(parts) if kind == "b64" else 32 // len(parts)
            value = sum(
                (self._bits(part) & np.uint64(2**width - 1)) << np.uint64(i * width)
                for i, part in enumerate(parts)
            )
            self._set(target, value, mask)
        elif name == "mov" and target.startswith("{"):
            parts = re.findall(r"[%\w]+", target)
            width = 64 // len(parts) if kind == "b64" else 32 // len(parts)
            bits = self._bits(operands[1])
            for i, part in enumerate(parts):
                self._set(part, bits >> np.uint64(i * width) & np.uint64(2**width - 1), mask)
        elif name in ("mov", "cvta"):
            self._set(target, self._bits(operands[1]), mask)
        elif name == "setp":
            a, b = (self._get(x, kind) for x in operands[1:3])
            self._set(target, COMPARE[modifiers[0]](a, b), mask)
        elif name == "selp":
            chosen = self._bits(operands[3]).astype(bool)
            self._set(target, np.where(chosen, *(self._bits(x) for x in operands[1:3])), mask)
        elif kind == "pred":
            values = [self._bits(x).astype(bool) for x in operands[1:]]
            self._set(target, ~values[0] if name == "not" else BITWISE[name](*values), mask)
        elif name == "cvt":
            self._set(target, self._convert(modifiers, operands), mask)
        else:
            self._set(target, self._arithmetic(name, modifiers, kind, operands[1:]), mask)

    def _memory(self, name, modifiers, operands, mask) -> None:
        dtype = np.dtype(TYPES[modifiers[-1]]) if modifiers[-1] in TYPES else None
        place, registers = (1, 0) if name == "ld" else (0, 1)
        names = re.findall(r"[-%\w]+", operands[registers])
        address, offset = self._address(operands[place])
        address = address + np.uint64(offset % 2**64)
        width = dtype.itemsize * len(names)
        if (address[mask] % np.uint64(width)).any():
            raise ValueError(f"misaligned {name} of {width} bytes")
        parameter = "param" in modifiers
        if not parameter:
            self.sectors += _sectors(address, mask)
        view = (self.constant if parameter else self.memory).view(dtype)
        base = 0 if parameter else self.base
        index = (address[mask].astype(np.int64) - base) // dtype.itemsize
        for i, register in enumerate(names):
            if name == "ld":
                value = np.zeros(self.count, dtype)
                value[mask] = view[index + i]
                self._set(register, value, mask)
            else:
                view[index + i] = self._get(register, modifiers[-1])[mask]

    def _convert(self, modifiers: list[str], operands: list[str]) -> np.ndarray:
        to, source = modifiers[-2:]
        if source == "bf16":
            return (self._bits(operands[1]).astype(np.uint32) << 16).view(np.float32)
        if to == "bf16":
            bits = self._get(operands[1], "f32").view(np.uint32)
            nan = np.isnan(self._get(operands[1], "f32"))
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return np.where(nan, 0x7FFF, rounded).astype(np.uint16)
        return self._get(operands[1], source).astype(TYPES[to])

    def _arithmetic(self, name: str, modifiers: list[str], kind: str, operands: list[str]):
        if name in ("mul", "mad") and "wide" in modifiers:
            wide = {"u32": np.uint64, "s32": np.int64, "u16": np.uint32, "s16": np.int32}[kind]
            value = self._get(operands[0], kind).astype(wide) * self._get(operands[1], kind)
            if name == "mad":
                value = value + self._get(operands[2], {np.uint64: "u64", np.int64: "s64"}[wide])
            return value.astype(wide)
        if name in ("shl", "shr"):
            amount = self._get(operands[1], "u32").astype(np.uint64)
            value = self._get(operands[0], kind)
            bits = value.dtype.itemsize * 8
            amount = np.minimum(amount, bits - 1 if kind[0] == "s" else bits).astype(value.dtype)
            shifted = (
                np.left_shift(value, amount) if name == "shl" else np.right_shift(value, amount)
            )
            return np.where(amount < bits, shifted, 0).astype(value.dtype)
        values = [self._get(x, kind) for x in operands]
        dtype = values[0].dtype
        if name in BITWISE:
            return BITWISE[name](*values)
        if name == "not":
            return ~values[0]
        if name == "neg":
            return -values[0]
        if name == "abs":
            return np.abs(values[0])
        if name == "fma":
            a, b, c = (x.astype(np.float64) for x in values)
            return (a * b + c).astype(dtype)
        if name == "mad":
            return values[0] * values[1] + values[2]
        if name == "mul" and "hi" in modifiers:
            wide = np.int64 if kind == "s32" else np.uint64
            return (values[0].astype(wide) * values[1].astype(wide) >> wide(32)).astype(dtype)
        if name in ("div", "rem"):
            if dtype.kind == "f":
                return values[0] / values[1]
            divisor = np.where(values[1] == 0, 1, values[1])
            quotient = np.trunc(values[0] / divisor.astype(dtype)).astype(dtype)
            return quotient if name == "div" else values[0] - quotient * divisor.astype(dtype)
        simple = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum,
                  "max": np.maximum}  # fmt: skip
        if name in simple:
            return simple[name](*values).astype(dtype)
        if name == "ex2":
            return np.exp2(values[0])
        if name == "lg2":
            return np.log2(values[0])
        if name == "rcp":
            return (1 / values[0]).astype(dtype)
        raise NotImplementedError(f"{name}.{'.'.join(modifiers)}")

    def instructions(self) -> int:
        """Warp instructions executed so far."""
        return sum(self.counts.values())
