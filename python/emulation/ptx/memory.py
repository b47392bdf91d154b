"""Global, shared and parameter memory of the PTX machine, and what accesses to them cost."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from emulation.ptx.arithmetic import TYPES
from emulation.ptx.instruction import Instruction, Lanes
from emulation.ptx.warp import registers

# Tensors, and what they held at an earlier time.
HeldBack = Sequence[tuple[torch.Tensor, torch.Tensor]]


def count_sectors(address: np.ndarray, mask: np.ndarray) -> int:
    """Distinct sectors of every warp's lanes; no access is wider than a sector, or crosses one."""
    sector = np.where(mask, (address // 32).astype(np.int64), -1).reshape(-1, 32)
    sector = np.sort(sector[mask.reshape(-1, 32).any(1)], axis=1)
    return int((np.diff(sector, axis=1, prepend=-1) != 0).sum())


def count_wavefronts(address: np.ndarray, mask: np.ndarray, width: int) -> tuple[int, int]:
    """Passes over the 32 banks of 4 bytes, and the fewest that these words could take.

    Lanes go in groups that request 128 bytes at most; a bank's distinct words follow one another.
    """
    warps = mask.reshape(-1, 32).any(1)
    mask, address = mask.reshape(-1, 32)[warps], address.reshape(-1, 32)[warps]
    words = np.maximum(width // 4, 1)
    word = address[..., None] // 4 + np.arange(words)
    word = np.where(mask[..., None], word, -1)
    groups = max(1, words)
    # [warp and group, words of its lanes]
    by_group = np.sort(word.reshape(len(word) * groups, -1), axis=1)
    new = (np.diff(by_group, axis=1, prepend=-1) != 0) & (by_group >= 0)
    passes = np.zeros((len(by_group), 32), np.int64)
    at, _ = np.nonzero(new)
    np.add.at(passes, (at, by_group[new] % 32), 1)
    whole = np.sort(word.reshape(len(word), -1), axis=1)
    distinct = ((np.diff(whole, axis=1, prepend=-1) != 0) & (whole >= 0)).sum(1)
    return int(passes.max(1).sum()), int(((distinct + 31) // 32).sum())


class Memory:
    """The memory that one launch can reach."""

    def __init__(self, machine: Lanes, arguments: list[bytes], tensors: list[torch.Tensor],
                 blocks: int, shared_bytes: int) -> None:  # fmt: skip
        self.machine = machine
        offsets = np.cumsum([0, *((len(x) + 15) // 16 * 16 for x in arguments)])
        for name, offset in zip(machine.parameters, offsets, strict=False):
            machine.values[name] = np.array(offset, np.uint64)
        padded = b"".join(x.ljust((len(x) + 15) // 16 * 16, b"\0") for x in arguments)
        self.constant = np.frombuffer(padded, np.uint8)
        regions = sorted(
            (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors
        )
        self.starts = np.array([start for start, _ in regions])
        self.ends = np.maximum.accumulate([start + size for start, size in regions])
        self.base = int(self.starts[0]) // 16 * 16
        span = (int(self.ends[-1]) - self.base + 15) // 16 * 16
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.base))
        # NaN of every type until somebody writes it.
        self.pitch = (shared_bytes + 15) // 16 * 16
        self.shared_bytes = shared_bytes
        self.shared = np.full(max(16, blocks * self.pitch), 0xFF, np.uint8)
        # cp.async: copies that have not arrived, and the groups that each thread has committed.
        self.copies: list[tuple[np.ndarray, ...]] = []
        self.groups = np.zeros(machine.count, np.int64)
        # Where a thread that has not waited for the grid before sees what was there before it.
        self.before: list[tuple[int, np.ndarray]] = []

    def hold_back(self, before: HeldBack) -> None:
        """Keeps what these tensors hold from threads that have not waited for the grid before."""
        for x, held in before:
            self.before.append((x.data_ptr() - self.base, held.view(-1).view(torch.uint8).numpy()))

    def _not_yet(self, value: np.ndarray, index: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Loaded elements, by their place in bytes, as these threads see them."""
        early = ~self.machine.waited[active]
        for start, held in self.before:
            old = early & (index >= start) & (index < start + len(held))
            value[old] = held.view(value.dtype)[(index[old] - start) // value.itemsize]
        return value

    def address(self, operand: str) -> np.ndarray:
        name, _, offset = operand.strip("[]").partition("+")
        address = self.machine.get(name, "s64") + int(offset or 0)
        return np.broadcast_to(address, self.machine.count)

    def _global(self, operand: str, mask: np.ndarray, width: int) -> np.ndarray:
        """The indices of the bytes that the threads of a mask access."""
        address = self.address(operand)
        self.machine.sectors += count_sectors(address, mask)
        address = address[mask]
        region = np.searchsorted(self.starts, address, side="right") - 1
        if (region < 0).any() or (address + width > self.ends[region]).any():
            raise IndexError(f"{operand} is outside of every tensor")
        return address - self.base

    def _shared(self, operand: str, mask: np.ndarray, width: int) -> np.ndarray:
        address = self.address(operand)
        passes, ideal = count_wavefronts(address, mask, width)
        self.machine.wavefronts += passes
        self.machine.ideal_wavefronts += ideal
        inside = address[mask]
        if (inside < 0).any() or (inside + width > self.shared_bytes).any():
            raise IndexError(f"{operand} is outside of shared memory")
        return inside + self.machine.block[mask].astype(np.int64) * self.pitch

    def execute(self, x: Instruction, mask: np.ndarray | None) -> None:
        """ld, st or cp.async."""
        space = next((m for m in x.modifiers if m in ("param", "shared", "global")), None)
        if x.name == "cp":
            self._copy_async(x, mask)
            return
        dtype = TYPES[x.kind]
        place, data = (1, 0) if x.name == "ld" else (0, 1)
        names = registers(x.operands[data])
        width = dtype.itemsize * len(names)
        if space == "param":
            first = self.address(x.operands[1]) // dtype.itemsize
            first = first[:1] if mask is None and (first == first[0]).all() else first
            # Threads that are not meant may hold any address.
            first = first if mask is None else np.where(mask, first, first[mask.argmax()])
            for i, register in enumerate(names):
                self.machine.set(register, self.constant.view(dtype)[first + i], mask)
            return
        active = np.ones(self.machine.count, bool) if mask is None else mask
        if space == "global":
            index, view = self._global(x.operands[place], active, width), self.bytes
        elif space == "shared":
            index, view = self._shared(x.operands[place], active, width), self.shared
        else:
            raise NotImplementedError(x.opcode)
        if (index % width).any():
            raise ValueError(f"misaligned {x.opcode}")
        view, index = view.view(dtype), index // dtype.itemsize
        for i, register in enumerate(names):
            if x.name == "ld":
                value = np.zeros(self.machine.count, dtype)
                value[active] = view[index + i]
                if space == "global" and self.before:
                    first = (index + i) * dtype.itemsize
                    value[active] = self._not_yet(value[active], first, active)
                self.machine.set(register, value, mask)
            else:
                if space == "global" and not self.machine.waited[active].all():
                    raise RuntimeError(f"{x.opcode} before griddepcontrol.wait")
                value = np.broadcast_to(self.machine.get(register, x.kind), self.machine.count)
                view[index + i] = value[active]
        if x.name == "st" and space == "shared":
            self.wrote_shared(np.flatnonzero(active), index * dtype.itemsize)

    def wrote_shared(self, thread: np.ndarray, place: np.ndarray) -> None:
        """Threads have written there, by a store or by a copy that has arrived."""

    def shared_rows(self, operand: str, mask: np.ndarray) -> np.ndarray:
        """16 bytes of shared memory for each thread, as eight numbers of 16 bits."""
        index = self._shared(operand, mask, 16)
        if (index % 16).any():
            raise ValueError("misaligned row of a matrix")
        rows = np.zeros((self.machine.count, 8), np.uint16)
        rows[mask] = self.shared.view(np.uint16).reshape(-1, 8)[index // 16]
        return rows

    def _copy_async(self, x: Instruction, mask: np.ndarray | None) -> None:
        """Data arrives as late as allowed: when it is waited for."""
        active = np.ones(self.machine.count, bool) if mask is None else mask
        if "commit_group" in x.modifiers:
            self.groups[active] += 1
            return
        if "wait_group" in x.modifiers:
            self._arrive(active, int(x.operands[0]))
            return
        target, source, width, valid = x.operands
        if int(width, 0) != 16:
            raise NotImplementedError(x.opcode)
        to = np.zeros(self.machine.count, np.int64)
        to[active] = self._shared(target, active, 16)
        loads = active & np.broadcast_to(self.machine.get(valid, "u32") == 16, self.machine.count)
        start = np.full(self.machine.count, -1)
        start[loads] = self._global(source, loads, 16)
        if (to % 16).any() or (start[loads] % 16).any():
            raise ValueError(f"misaligned {x.opcode}")
        self.copies.append((active.copy(), self.groups.copy(), to, start))

    def _arrive(self, active: np.ndarray, left: int) -> None:
        for pending, group, to, start, *_ in self.copies:
            done = pending & active & (group < self.groups - left)
            data = self.bytes.view(np.uint64).reshape(-1, 2)[start[done] // 16]
            data[start[done] < 0] = 0
            self.shared.view(np.uint64).reshape(-1, 2)[to[done] // 16] = data
            self.wrote_shared(np.flatnonzero(done), to[done])
            pending &= ~done
        self.copies = [copy for copy in self.copies if copy[0].any()]
