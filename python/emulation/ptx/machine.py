"""Runs the PTX that nvcc emits, all threads of a launch at once as numpy vectors.

An independent path to a kernel's results: the emulator trusts the host compiler and its own twins
of PTX instructions, this machine trusts nvcc and the PTX manual. Threads at the lowest program
counter run next, which brings branches together again where they meet; a barrier holds a block's
threads until all have come. Every executed instruction is counted once per warp; loads of
parameters, which become constant operands, are not.

This file reads and schedules; arithmetic.py computes what each lane computes, warp.py what lanes do
together, memory.py loads, stores and counts them.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from emulation.artifacts import ROOT, hash_of, kept, nvcc_version, run_nvcc
from emulation.ptx import arithmetic
from emulation.ptx import warp as ptx_warp
from emulation.ptx.instruction import Instruction
from emulation.ptx.memory import HeldBack, Memory
from emulation.tools import with_includes

BUILD = ROOT / "build" / "ptx"


def compile_ptx(
    source: Path, architecture: int, include: Path = ROOT / "csrc", flags: Sequence[str] = ()
) -> str:
    """PTX of a kernel source, which may include files of a copy of csrc; kept on disk."""
    flags = ["-std=c++20", "-O3", f"-arch=sm_{architecture}", "-ptx", *flags]
    made_from = [nvcc_version(), *flags, hash_of(with_includes(source, (include,)))]
    path = kept(
        BUILD / f"{source.stem}.ptx",
        made_from,
        lambda path: run_nvcc(*flags, "-I", include, source, "-o", path),
    )
    return path.read_text()


class Machine:
    """One kernel of a PTX text, by a part of its mangled name."""

    def __init__(self, ptx: str, kernel: str) -> None:
        ptx = re.sub(r"//.*", "", ptx)
        # Inline assembly may end with a brace at the beginning of a line too; behind that of a
        # kernel comes a directive or nothing.
        found = re.search(
            rf"\.entry (\w*{kernel}\w*)\((.*?)\)[^{{;]*\{{(.*?)^\}}(?=\s*(\.(?!loc)|\Z))",
            ptx,
            re.DOTALL | re.MULTILINE,
        )
        if not found:
            raise KeyError(f"no kernel {kernel} in this PTX")
        self.parameters = re.findall(r"(\w+_param_\d+)", found[2])
        self.widths = {
            name.strip("% ").partition("<")[0]: width
            for width, names in re.findall(r"\.reg \.[a-z]*(\d+|pred)\s+([^;]+);", found[3])
            for name in names.split(",")
        }
        # Dynamic shared memory, the only kind that the kernels have, begins at 0.
        self.symbols = re.findall(r"\.extern \.shared[^;]* (\w+)\[\]", ptx)
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        # Where instructions come from, as path:line, if nvcc was told -lineinfo.
        self.lines: dict[int, str] = {}
        files, place = dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx)), ""
        for line in found[3].splitlines():
            if found_line := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
                place = f"{files[found_line[1]]}:{found_line[2]}"
            else:
                self._add(re.sub(r";\s*\}*$", "", line.strip()))
                self.lines.setdefault(len(self.code) - 1, place)
        self.counts: collections.Counter[str] = collections.Counter()
        self.sectors = 0  # of 32 bytes, that the lanes of a warp touch in one load or store
        self.wavefronts = 0  # passes over the banks of shared memory
        self.ideal_wavefronts = 0  # those of accesses without bank conflicts

    def _add(self, statement: str) -> None:
        if label := re.match(r"(\$\w+):", statement):
            self.labels[label[1]] = len(self.code)
            return
        statement = statement.lstrip("{ \t")  # inline assembly stands in separate braces
        if not statement or statement[0] in ".}(":
            return
        guard = re.match(r"@(!?%\w+)\s+", statement)
        if guard:
            statement = statement[guard.end() :]
        opcode, _, rest = statement.replace("\t", " ").partition(" ")
        name, *modifiers = opcode.replace("::", "_").split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        operands = [operand.replace(" ", "") for operand in operands]
        self.code.append(
            Instruction(
                guard[1] if guard else None, opcode, name, tuple(modifiers), tuple(operands)
            )
        )

    def launch(self, grid, block, arguments: list[bytes], tensors: list[torch.Tensor],
               shared_bytes: int = 0, before: HeldBack | None = None) -> None:  # fmt: skip
        """Runs a launch on the memory of the tensors, which the arguments point into.

        Args:
            before: of a programmatic dependent launch: tensors, and what they held before the
                launches that it is behind. Until a thread has waited for those it sees that.
        """
        size = block[0] * block[1] * block[2]
        per_block = (size + 31) // 32 * 32
        blocks = grid[0] * grid[1] * grid[2]
        thread = np.tile(np.arange(per_block, dtype=np.uint32), blocks)
        self.block = np.repeat(np.arange(blocks, dtype=np.uint32), per_block)
        self.count = len(thread)
        self.lane = (thread % np.uint32(32)).astype(np.int64)
        self.values = {"%laneid": thread % np.uint32(32)}
        self.memory = self._memory(arguments, tensors, blocks, shared_bytes)
        self.waits_from = 0 if before is None else None  # instructions
        self.waited = np.full(self.count, before is None)
        if before is not None:
            self.memory.hold_back(before)
        for of, index, sizes in (("tid", thread, block), ("ctaid", self.block, grid)):
            x, y, z = (np.uint32(n) for n in sizes)
            self.values[f"%{of}.x"] = index % x
            self.values[f"%{of}.y"] = index // x % y
            self.values[f"%{of}.z"] = index // (x * y)
            for axis, n in zip("xyz", (x, y, z), strict=True):
                self.values[f"%n{of}.{axis}"] = np.full(self.count, n, np.uint32)
        for name in self.symbols:
            self.values[name] = np.zeros((), np.uint32)
        self.per_block = per_block
        end = len(self.code)
        with np.errstate(all="ignore"):
            self._run(np.where(thread < size, 0, end), end)
        if not self.waited[thread < size].all():
            raise RuntimeError("a thread ends without griddepcontrol.wait")

    def _memory(self, arguments, tensors, blocks: int, shared_bytes: int) -> Memory:
        return Memory(self, arguments, tensors, blocks, shared_bytes)

    def _run(self, pc: np.ndarray, until: int) -> None:
        """Runs every thread from its place in the code to ``until``, or to its end."""
        end, per_block = len(self.code), self.per_block
        waiting = np.zeros(self.count, bool)  # at a barrier
        held = np.zeros(self.count, bool)  # at an instruction that names lanes still to come
        self.asleep = np.zeros(self.count, bool)  # until the phase of a barrier ends
        stops = set(self.labels.values())
        while True:
            at = int(np.where(waiting | held | self.asleep | (pc == until), end, pc).min())
            if at == end:
                if held.any():
                    opcode = self.code[int(pc[held].min())].opcode
                    raise RuntimeError(f"{opcode} without all of the lanes that it names")
                if self.asleep.any():
                    raise RuntimeError(
                        "a thread waits for a phase of an mbarrier that no thread ends"
                    )
                return
            mask = (pc == at) & ~waiting & ~self.asleep
            held &= ~mask
            full = bool(mask.all())
            warps = int(mask.reshape(-1, 32).any(1).sum())
            while True:
                x = self.code[at]
                active, every = mask, full
                if x.guard:
                    taken = self.values[x.guard.lstrip("!")]
                    active, every = mask & (~taken if x.guard[0] == "!" else taken), False
                if not (x.name == "ld" and x.modifiers[0] == "param"):
                    self.counts[x.opcode] += warps
                at += 1
                if x.name == "bra":
                    self._branch(x, pc, mask, active, at)
                    break
                if x.name in ("ret", "exit"):
                    pc[mask] = at
                    pc[active] = end
                elif x.name in ("bar", "barrier") and "warp" not in x.modifiers:
                    pc[mask] = at
                    waiting |= active
                else:
                    early = self._incomplete(x, active) if not full else np.zeros(0, bool)
                    sleepers = self._sleepers(x, active)
                    if early.any() or sleepers.any():
                        if early.any():
                            held |= early
                        else:
                            early = sleepers
                            self.asleep |= sleepers
                        # It is executed, and counted, when they go on.
                        self.counts[x.opcode] -= int(early.reshape(-1, 32).any(1).sum())
                        pc[mask] = at - 1
                        stops.add(at - 1)
                        if not (mask & ~early).any():
                            break
                        mask, active = mask & ~early, active & ~early
                        full, every = False, False
                        warps = int(mask.reshape(-1, 32).any(1).sum())
                    self._execute(x, None if every else active)
                    if at in stops:
                        pc[mask] = at
                        break
                    continue
                # Those who have left are not waited for.
                arrived = (waiting | (pc == end)).reshape(-1, per_block).all(1)
                waiting &= ~np.repeat(arrived, per_block)
                break

    def _incomplete(self, x: Instruction, active: np.ndarray) -> np.ndarray:
        """Threads that an instruction keeps waiting for others."""
        if x.name in ptx_warp.INSTRUCTIONS:
            return ptx_warp.incomplete(self, x, active)
        return np.zeros(0, bool)

    def _sleepers(self, x: Instruction, active: np.ndarray) -> np.ndarray:
        """Threads that an instruction keeps waiting for the phase of a barrier."""
        return np.zeros(0, bool)

    def _branch(self, x: Instruction, pc: np.ndarray, mask, active, following: int) -> None:
        pc[mask] = following
        pc[active] = self.labels[x.operands[0]]

    # Operands. A register holds raw bits of its declared width, a predicate bools.

    def bits(self, operand: str) -> np.ndarray:
        """Raw bits of a register, or of a constant as 64 bits."""
        value = self.values.get(operand)
        if value is None:
            if operand.startswith("%"):
                raise ValueError(f"{operand} is read before it is written")
            radix = 16 if operand[:2] in ("0f", "0d") else 0
            number = int(operand[2:] if radix else operand, radix) & (2**64 - 1)
            value = self.values[operand] = np.array(number, np.uint64)
        return value

    def get(self, operand: str, kind: str) -> np.ndarray:
        """An operand as numbers of a PTX type."""
        bits, dtype = self.bits(operand), arithmetic.TYPES[kind]
        if bits.itemsize != dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        return bits.view(dtype)

    def set(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Writes a register of the threads of a mask, or of all."""
        if register == "_":
            return
        width = self.widths[register.strip("%0123456789")]
        if width == "pred":
            raw = np.asarray(value).astype(bool)
        else:
            value = np.asarray(value)
            size = int(width) // 8
            if value.dtype.kind == "i":
                value = value.astype(f"i{size}")  # extends the sign
            elif value.dtype == bool:
                value = value.astype(np.uint8)
            raw = value.view(f"u{value.itemsize}").astype(f"u{size}")
        if mask is None:
            self.values[register] = np.broadcast_to(raw, self.count).copy()
            return
        if register not in self.values:
            self.values[register] = np.zeros(self.count, raw.dtype)
        np.copyto(self.values[register], raw, where=mask)

    def _execute(self, x: Instruction, mask: np.ndarray | None) -> None:
        target = x.operands[0] if x.operands else ""
        if x.name in ("ld", "st", "cp"):
            self.memory.execute(x, mask)
        elif x.name in ptx_warp.INSTRUCTIONS:
            ptx_warp.INSTRUCTIONS[x.name](self, x, mask)
        elif x.name == "griddepcontrol":
            self._depend(x, mask)
        elif x.name == "mov" and "{" in x.operands[-1] + target:
            packed, parts = x.operands if "{" in x.operands[1] else x.operands[::-1]
            parts = re.findall(r"[%\w]+", parts)
            width = int(x.kind[1:]) // len(parts)
            ones = np.uint64(2**width - 1)
            if packed == target:
                value = sum((self.bits(part).astype(np.uint64) & ones) << np.uint64(i * width)
                            for i, part in enumerate(parts))  # fmt: skip
                self.set(target, value, mask)
            else:
                value = self.bits(packed).astype(np.uint64)
                for i, part in enumerate(parts):
                    self.set(part, value >> np.uint64(i * width) & ones, mask)
        elif x.name in ("mov", "cvta"):
            self.set(target, self.bits(x.operands[1]), mask)
        else:
            self.set(target, arithmetic.compute(self, x), mask)

    def _depend(self, x: Instruction, mask: np.ndarray | None) -> None:
        """The next grid sees what this one writes once it has waited, and no earlier."""
        if "wait" not in x.modifiers:
            return
        self.waited[slice(None) if mask is None else mask] = True
        if self.waits_from is None:
            self.waits_from = self.instructions()

    def instructions(self, name: str = "") -> int:
        """Warp instructions executed so far, of one name or all."""
        return sum(n for opcode, n in self.counts.items() if opcode.startswith(name))
