"""PTX instructions of compute capability 9.0: mbarriers, the proxy fence, products of warpgroups.

Fragments and descriptors are the formulas of the PTX manual ("Asynchronous warpgroup level matrix
instructions"). Products run as late as allowed: when they are waited for. Until then no thread may
touch the registers of their sums, nor write those of their first operand; registers that were
written since the last wgmma.fence must not be among them; and what they read in shared memory must
have come before a fence.proxy.async of the thread that wrote it. A violation is a RuntimeError.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np

from emulation.ptx.instruction import Instruction
from emulation.ptx.machine import Machine
from emulation.ptx.memory import Memory
from emulation.ptx.warp import GROUP, IN_GROUP, elements_as_floats, registers

THREADS = 128  # of a warpgroup
ROWS, COLUMNS, DEPTH = 64, 128, 16
MMA = f"m{ROWS}n{COLUMNS}k{DEPTH}"


@functools.cache
def registers_of(x: Instruction) -> tuple[str, ...]:
    return tuple(name for operand in x.operands for name in registers(operand) if name[0] == "%")


@dataclasses.dataclass
class Barrier:
    """An mbarrier: arrivals of a phase, those still to come, and phases that have ended."""

    count: int
    left: int
    phases: int = 0


class WarpgroupMemory(Memory):
    """Knows who wrote 16 bytes of shared memory and has not fenced it since."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.unfenced = np.full(len(self.shared) // 16, -1, np.int32)

    def wrote_shared(self, thread: np.ndarray, place: np.ndarray) -> None:
        self.unfenced[place // 16] = thread

    def fence(self, active: np.ndarray) -> None:
        writers = self.unfenced
        writers[(writers >= 0) & active[writers]] = -1

    def operand(self, descriptor: int, block: int, by_rows: bool) -> np.ndarray:
        """A second operand, [depth, columns] of 16 bits."""
        address, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        if descriptor >> 62 != 1 or descriptor >> 49 & 7 or address & 0x380:
            raise RuntimeError(f"descriptor {descriptor:#x} is not of the 128-byte swizzle")
        depth, column = np.meshgrid(np.arange(DEPTH), np.arange(COLUMNS), indexing="ij")
        major, minor = (depth, column) if by_rows else (column, depth)
        # In elements of 128 bits the atom of the swizzle is 8 x 8, whichever dimension leads. Where
        # it is that of columns, `leading` is from 64 of them to the next.
        place = address + major // 8 * stride + major % 8 * 128 + minor % 64 * 2
        place += minor // 64 * leading if by_rows else 0
        place ^= place >> 3 & 0x70
        if place.max() + 2 > self.shared_bytes:
            raise IndexError("an operand of a product is outside of shared memory")
        place += block * self.pitch
        if (self.unfenced[place // 16] >= 0).any():
            raise RuntimeError("a product reads what no fence.proxy.async has come after")
        self.machine.wavefronts += DEPTH * COLUMNS * 2 // 128
        self.machine.ideal_wavefronts += DEPTH * COLUMNS * 2 // 128
        return self.shared.view(np.uint16)[place // 2]


@dataclasses.dataclass
class Product:
    """One instruction, of all warpgroups that executed it together; by thread."""

    x: Instruction
    active: np.ndarray
    group: np.ndarray
    descriptor: np.ndarray
    adds: np.ndarray


class WarpgroupMachine(Machine):
    """A machine for kernels of sm_90a."""

    memory: WarpgroupMemory

    def _memory(self, arguments, tensors, blocks: int, shared_bytes: int) -> Memory:
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.products: list[Product] = []
        self.groups = np.zeros(self.count, np.int64)
        # Fences of a thread so far; and of a register, how many there were when a thread wrote it,
        # whether a thread has it as a sum or as a first operand of a product in flight.
        self.fences = np.zeros(self.count, np.int32)
        self.written: dict[str, np.ndarray] = collections.defaultdict(
            lambda: np.full(self.count, -1, np.int32)
        )
        nobody = functools.partial(np.zeros, self.count, bool)
        self.sums: dict[str, np.ndarray] = collections.defaultdict(nobody)
        self.operands: dict[str, np.ndarray] = collections.defaultdict(nobody)
        return WarpgroupMemory(self, arguments, tensors, blocks, shared_bytes)

    def _execute(self, x: Instruction, mask: np.ndarray | None) -> None:
        active = np.ones(self.count, bool) if mask is None else mask
        if x.name == "wgmma":
            self._warpgroup(x, active)
            return
        self._look_at_registers(x, active)
        if x.name == "mbarrier":
            self._barrier(x, active)
        elif x.name == "fence":
            if x.modifiers[:2] != ("proxy", "async"):
                raise NotImplementedError(x.opcode)
            self.memory.fence(active)
        elif x.name == "trap":
            if active.any():
                raise RuntimeError("trap")
        elif x.name != "setmaxnreg":
            super()._execute(x, mask)

    def _look_at_registers(self, x: Instruction, active: np.ndarray) -> None:
        names = registers_of(x)
        for name in names:
            if name in self.sums and (self.sums[name] & active).any():
                raise RuntimeError(f"{x.opcode} touches {name}, a sum of a product in flight")
        if x.name in ("st", "bar", "bra", "fence", "mbarrier", "setmaxnreg"):
            return
        for name in registers(x.operands[0]) if x.operands else ():
            if name in self.operands and (self.operands[name] & active).any():
                raise RuntimeError(f"{x.opcode} writes {name}, which a product in flight reads")
            np.copyto(self.written[name], self.fences, where=active)

    # Barriers.

    def _barrier_at(self, operand: str, thread: int) -> Barrier:
        key = int(self.block[thread]), int(self.memory.address(operand)[thread])
        if key not in self.barriers:
            raise RuntimeError("an mbarrier that was not initialized")
        return self.barriers[key]

    def _barrier(self, x: Instruction, active: np.ndarray) -> None:
        what = x.modifiers[0]
        for thread in np.flatnonzero(active):
            if what == "init":
                count = int(np.broadcast_to(self.get(x.operands[1], "u32"), self.count)[thread])
                address = int(self.memory.address(x.operands[0])[thread])
                if address % 8 or address + 8 > self.memory.shared_bytes:
                    raise IndexError("an mbarrier is misaligned or outside of shared memory")
                self.barriers[int(self.block[thread]), address] = Barrier(count, count)
            elif what == "arrive":
                barrier = self._barrier_at(x.operands[1], thread)
                barrier.left -= 1
                if barrier.left == 0:
                    barrier.left = barrier.count
                    barrier.phases += 1
                    self.asleep[:] = False
            elif what != "try_wait":
                raise NotImplementedError(x.opcode)
        if what == "try_wait":
            # Those whose phase has not ended are asleep.
            self.set(x.operands[0], np.ones(self.count, bool), active)

    def _sleepers(self, x: Instruction, active: np.ndarray) -> np.ndarray:
        """Threads that wait for a phase that has not ended."""
        sleeping = np.zeros(self.count, bool)
        if x.name != "mbarrier" or x.modifiers[0] != "try_wait":
            return sleeping
        parity = np.broadcast_to(self.get(x.operands[2], "u32"), self.count)
        # All of a warp's threads wait for one barrier.
        for warp in np.flatnonzero(active.reshape(-1, 32).any(1)):
            thread = warp * 32 + int(active[warp * 32 : warp * 32 + 32].argmax())
            barrier = self._barrier_at(x.operands[1], thread)
            if barrier.phases % 2 == int(parity[thread]) % 2:
                sleeping[warp * 32 : warp * 32 + 32] = active[warp * 32 : warp * 32 + 32]
        return sleeping

    # Products.

    def _incomplete(self, x: Instruction, active: np.ndarray) -> np.ndarray:
        """A product, and a wait for products, are of whole warpgroups here."""
        if x.name == "wgmma" and x.modifiers[0] in ("mma_async", "wait_group"):
            return active & ~np.repeat(active.reshape(-1, THREADS).all(1), THREADS)
        return super()._incomplete(x, active)

    def _warpgroup(self, x: Instruction, active: np.ndarray) -> None:
        what = x.modifiers[0]
        if what == "fence":
            self.fences[active] += 1
        elif what == "commit_group":
            self.groups[active] += 1
        elif what == "mma_async":
            self._begin(x, active)
        elif what == "wait_group":
            self._wait(active, int(x.operands[0]))
        else:
            raise NotImplementedError(x.opcode)

    def _begin(self, x: Instruction, active: np.ndarray) -> None:
        if MMA not in x.modifiers or len(x.operands) != 7 or x.operands[4:6] != ("1", "1"):
            raise NotImplementedError(x.opcode)
        sums, a = registers(x.operands[0]), registers(x.operands[1])
        for name in (*sums, *a):
            if ((self.written[name] == self.fences) & active).any():
                raise RuntimeError(f"a product takes {name} without a wgmma.fence before it")
        for name in a:
            if (self.sums[name] & active).any():
                raise RuntimeError(f"a product takes {name}, a sum of another one in flight")
            self.operands[name] |= active
        for name in sums:
            self.sums[name] |= active
        at_once = (self.get(x.operands[2], "u64"), self.bits(x.operands[3]))
        descriptor, adds = (np.broadcast_to(value, self.count).copy() for value in at_once)
        self.products.append(Product(x, active.copy(), self.groups.copy(), descriptor, adds))

    def _wait(self, active: np.ndarray, left: int) -> None:
        for product in self.products:
            done = product.active & active & (product.group < self.groups - left)
            for warpgroup in np.flatnonzero(done.reshape(-1, THREADS).any(1)):
                self._multiply(product, warpgroup * THREADS)
            product.active &= ~done
        self.products = [product for product in self.products if product.active.any()]
        for of, operand in ((self.sums, 0), (self.operands, 1)):
            of.clear()
            for product in self.products:
                for name in registers(product.x.operands[operand]):
                    of[name] |= product.active

    def _multiply(self, product: Product, first: int) -> None:
        threads, x = slice(first, first + THREADS), product.x

        def values(operand: str, kind: str) -> np.ndarray:
            return np.broadcast_to(self.get(operand, kind), self.count)[threads]

        kind, by_rows = x.modifiers[-1], x.operands[6] == "1"
        descriptor = product.descriptor[threads]
        if (descriptor != descriptor[0]).any():
            raise RuntimeError("a descriptor differs between the threads of a warpgroup")
        bits = self.memory.operand(int(descriptor[0]), int(self.block[first]), by_rows)
        right = elements_as_floats(bits, kind)
        # A, [64, 16]: a_i of eight elements, by warp as in mma.m16n8k16.
        i = np.arange(8)
        warp = np.repeat(np.arange(4), 32)[:, None]
        group, in_group = np.tile(GROUP, 4)[:, None], np.tile(IN_GROUP, 4)[:, None]
        pairs = np.stack([values(name, "b32") for name in registers(x.operands[1])], -1)
        left = np.empty((ROWS, DEPTH), np.float32)
        row = 16 * warp + np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
        left[row, in_group * 2 + (i & 1) + np.where(i < 4, 0, 8)] = elements_as_floats(
            np.ascontiguousarray(pairs).view(np.uint16), kind
        )
        products = left @ right
        # D, [64, 128]: d_i of 64 floats.
        i = np.arange(COLUMNS // 2)
        row = 16 * warp + group + np.where(i % 4 < 2, 0, 8)
        result = products[row, 8 * (i // 4) + 2 * in_group + (i & 1)]
        for j, name in enumerate(registers(x.operands[0])):
            if name not in self.values:
                self.values[name] = np.full(self.count, 0xFFFFFFFF, np.uint32)
            before = values(name, "f32") if product.adds[first] else np.float32(0)
            self.values[name][threads] = (before + result[:, j]).view(np.uint32)
