"""The CUDA kernels compiled for real, for every architecture, and what that says without a GPU:
registers, spills, local memory, instructions, occupancy, bytes in flight.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import json
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from emulation.artifacts import ROOT, hash_of, kept, nvcc_version, run_compiler, run_nvcc
from emulation.static.cards import CARDS, SM
from emulation.tools import tool, with_includes

# For sm_90a only: instructions that no other architecture has.
WARPGROUP = ROOT / "csrc" / "cuda" / "ragged_attention" / "warpgroup.cu"
# For every architecture.
SOURCES = sorted(set((ROOT / "csrc" / "cuda").rglob("*.cu")) - {WARPGROUP})
BUILD = ROOT / "build" / "static"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Architecture -> the one whose PTX it is assembled from. nvcc's front end writes the same for both,
# but for the line that names the target (tests/cuda/test_cuda_static.py holds it).
FRONT_END = {75: 75, 80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 120: 100}
# Architectures whose PTX is kept too, for the machine of emulation/ptx.
PTX_ARCHITECTURES = (75, 80)
FLAGS = ["-std=c++20", "-O3", "-I", "csrc", "-Xptxas", "-v"]


class Line(NamedTuple):
    """One instruction. Bits 46 to 48 of the second half of its code name the scoreboard that it
    raises until its result is there (7: none), bits 52 to 57 those that it waits for."""

    address: int
    opcode: str
    operands: str
    code: int
    guarded: bool = False

    @property
    def scoreboard(self) -> int:
        return self.code >> 46 & 7

    def waits_for(self, scoreboard: int) -> bool:
        return bool(self.code >> 52 + scoreboard & 1)

    def loaded_bytes(self) -> int:
        """Bytes per thread of a load from global memory; 0 for anything else."""
        if not self.opcode.startswith("LDG."):
            return 0
        return 16 if ".128" in self.opcode else 8 if ".64" in self.opcode else 4


class Flight(NamedTuple):
    """Bytes per thread in flight in a loop; the mean is over its instructions."""

    least: int
    mean: float
    most: int


@dataclasses.dataclass
class Kernel:
    """One compiled kernel: ``name`` is like ``insert_kv_kernel<16>``."""

    name: str
    architecture: int
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    opcodes: list[str] = dataclasses.field(default_factory=list)
    lines: list[Line] = dataclasses.field(default_factory=list, repr=False)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches from its beginning, as `LDG.*128`."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)

    def loads_in_flight(self) -> int:
        """Bytes of the most 16-byte loads between two stores: in flight at once, per thread."""
        best = run = 0
        for opcode in self.opcodes:
            if opcode.startswith("LDG") and ".128" in opcode:
                run += 1
            elif opcode.startswith("STG"):
                run = 0
            best = max(best, run)
        return 16 * best

    def has_products(self) -> bool:
        return self.count("HMMA") > 0

    def _loops(self) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """First and last lines of the loops with tensor core products; targets of branches."""
        place = {line.address: i for i, line in enumerate(self.lines)}
        target_of = {}
        for i, line in enumerate(self.lines):
            found = re.search(r"0x([0-9a-f]+)$", line.operands)
            if line.opcode.startswith("BRA") and found and int(found[1], 16) in place:
                target_of[i] = place[int(found[1], 16)]

        def multiplies(first: int, last: int) -> bool:
            return any(x.opcode.startswith(("HMMA", "HGMMA")) for x in self.lines[first:last])

        # A loop ends with the last branch back to its beginning.
        ends: dict[int, int] = {}
        for i, first in target_of.items():
            if first < i:
                ends[first] = max(ends.get(first, 0), i)
        return [(first, end) for first, end in ends.items() if multiplies(first, end)], target_of

    def shortest_turn(self) -> int:
        """Instructions of the shortest way through the shortest loop with products: options, masks,
        values that are not finite and rescaling left out."""
        loops, target_of = self._loops()
        first, last = min(loops, key=lambda loop: loop[1] - loop[0])
        least = {first: 1}  # with the line itself
        for i in range(first, last):
            if i in least:
                to = target_of.get(i)
                ways = [to] if to is not None and i < to <= last else []
                ways += [i + 1] if to is None or self.lines[i].guarded else []
                least |= {way: min(least.get(way, 1 << 30), least[i] + 1) for way in ways}
        return least[last]

    def product_loop(self) -> list[Line]:
        """The innermost loop with tensor core products, without what its branches may skip and that
        has neither products nor wide loads: masks, rescaling, options."""
        loops, target_of = self._loops()
        # Around the loop over keys is the one over a block's items; next to an unrolled loop is the
        # short one for what its turns leave over.
        innermost = [
            (first, end) for first, end in loops
            if not any(first < other and last <= end for other, last in loops)
        ]  # fmt: skip
        i, last = max(innermost, key=lambda loop: loop[1] - loop[0])

        def matters(lines: list[Line]) -> bool:
            return any(x.opcode.startswith("HMMA") or x.loaded_bytes() >= 8 for x in lines)

        body = []
        while i <= last:
            body.append(self.lines[i])
            to = target_of.get(i, 0)
            i = to if i < to <= last and not matters(self.lines[i + 1 : to]) else i + 1
        return body

    def loop_flight(self) -> Flight:
        """Bytes in flight as the flow of data allows: until the first use of a load's result."""
        flying: dict[int, tuple[int, int]] = {}  # register -> first register and bytes of its load
        levels = []
        for turn in range(2):  # the first finds out what is in flight when the loop begins again
            for line in self.product_loop():
                used = set()
                for register, wide in re.findall(r"\bR(\d+)(\.64)?", line.operands):
                    used |= {int(register), int(register) + bool(wide)}
                if line.opcode.startswith(("HMMA", "STG", "STS")):
                    # A, or what is stored, takes registers that follow the one named.
                    used |= {r + k for r in set(used) for k in (1, 2, 3)}
                size = line.loaded_bytes()
                if size:
                    first = int(re.match(r"R(\d+)", line.operands)[1])
                    # Addresses are read, the target is not.
                    used = {
                        int(r) + k for r in re.findall(r"\[R(\d+)", line.operands) for k in (0, 1)
                    }
                for base in {flying[r] for r in used & flying.keys()}:
                    flying = {r: b for r, b in flying.items() if b != base}
                if size:
                    flying |= {first + k: (first, size) for k in range(size // 4)}
                if turn:
                    levels.append(sum(size for _, size in set(flying.values())))
        return Flight(min(levels), sum(levels) / len(levels), max(levels))

    def loop_waits(self) -> Flight:
        """Bytes in flight as the code waits: until an instruction waits for a load's
        scoreboard, which it may share with loads that are needed earlier."""
        flying: list[Line] = []
        levels = []
        for turn in range(2):
            for line in self.product_loop():
                flying = [load for load in flying if not line.waits_for(load.scoreboard)]
                if line.loaded_bytes():
                    flying.append(line)
                if turn:
                    levels.append(sum(load.loaded_bytes() for load in flying))
        return Flight(min(levels), sum(levels) / len(levels), max(levels))

    def blocks_per_sm(self, threads: int, dynamic_shared: int = 0) -> int:
        """Resident blocks: registers go in units of 256 per warp, shared memory in 128 bytes."""
        sm, warps = SM[self.architecture], math.ceil(threads / 32)
        per_warp = math.ceil(self.registers * 32 / 256) * 256
        reserved = 0 if self.architecture == 75 else 1024
        shared = math.ceil((self.shared + dynamic_shared + reserved) / 128) * 128
        # The four partitions of a multiprocessor share registers out in whole warps.
        by_registers = sm.registers // 4 // per_warp * 4 // warps if per_warp else sm.blocks
        by_shared = sm.shared_bytes // shared if shared else sm.blocks
        return min(sm.blocks, sm.warps // warps, by_registers, by_shared)


def _demangle(names: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = {}
    for name, full in zip(names, done.stdout.splitlines(), strict=True):
        full = re.sub(r"^void ", "", full)
        full = re.sub(r"\(anonymous namespace\)::|baton::cuda::", "", full)
        short[name] = re.sub(r"\((int|bool|Angles)\)", "", full).partition("(")[0]
    return short


class Compiled(NamedTuple):
    """The code that nvcc and ptxas make of a source, for all architectures."""

    report: str  # of ptxas
    listing: str  # the machine code
    ptx: dict[int, str]  # by architecture, of those in PTX_ARCHITECTURES, and of sm_90a


def first_architectures(source: Path) -> tuple[int, ...]:
    """Those that `make test` compiles it for: sm_80.

    None for half.cu, which is bfloat16.cu with another type of number, and for the kernels with a
    block table, which differ from the others only in where they look for keys. `make
    test-cuda-build` puts the same questions to the library that it builds: every kernel, for every
    architecture.
    """
    if source == WARPGROUP:
        return (90,)
    same = source.stem.startswith("half") or source.stem.endswith("_paged")
    return () if same else (80,)


def other_architectures(source: Path) -> tuple[int, ...]:
    if source == WARPGROUP:
        return ()
    return tuple(sm for sm in ARCHITECTURES if sm not in first_architectures(source))


@functools.cache
def compiled(source: Path, architectures: tuple[int, ...]) -> Compiled:
    """A source compiled once, for every question about it; kept on disk."""
    cuobjdump = tool("cuobjdump")
    if not cuobjdump:
        raise FileNotFoundError(
            "needs cuobjdump: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
        )

    kind_of = {sm: "90a" if source == WARPGROUP else str(sm) for sm in architectures}
    with_ptx = [sm for sm in architectures if sm in PTX_ARCHITECTURES or source == WARPGROUP]

    def code(front_end: int) -> str:
        kinds = [f"sm_{kind_of[sm]}" for sm in architectures if FRONT_END[sm] == front_end]
        front_end_kind = f"compute_{kind_of.get(front_end, front_end)}"
        kinds += [front_end_kind] if front_end in with_ptx else []
        return f"-gencode=arch={front_end_kind},code=[{','.join(kinds)}]"

    front_ends = sorted({FRONT_END[sm] for sm in architectures})
    arguments = [*FLAGS, *map(code, front_ends), "--threads", "2", "-fatbin", str(source)]

    def make(path: Path) -> None:
        fatbin = path.with_suffix(".fatbin")
        report = run_nvcc(*arguments, "-o", fatbin).stderr
        listing = "\n".join(shortened(run_compiler([cuobjdump, "-sass", fatbin]).stdout))
        ptx = {
            architecture: ptx_text(
                run_compiler(
                    [cuobjdump, "-ptx", "-arch", f"sm_{kind_of[architecture]}", fatbin]
                ).stdout
            )
            for architecture in with_ptx
        }
        path.write_text(json.dumps([report, listing, ptx]))

    made_from = [nvcc_version(), *arguments, inspect.getsource(shortened)]
    made_from.append(hash_of(with_includes(source, (ROOT / "csrc",))))
    path = kept(BUILD / f"{source.stem}.json", made_from, make)
    report, listing, ptx = json.loads(path.read_text())
    return Compiled(report, listing, {int(key): text for key, text in ptx.items()})


def ptx_text(listing: str) -> str:
    """The PTX in what cuobjdump prints, without what it says about it."""
    return listing[listing.index(".version") :]


def shortened(sass: str) -> list[str]:
    """cuobjdump's lines without encodings, but for the half that has the scoreboards."""
    lines = sass.splitlines()
    kept = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if re.search(r"Function :|code for", line):
            kept.append(line)
        elif found := re.match(r"(.*\*/ +\S.*;)", line):
            half = re.match(r"\s*/\* (0x[0-9a-f]{16}) \*/", after)
            kept.append(f"{found[1]} {half[1]}")
    return kept


def compile_kernels(source: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """Every kernel of a source for these architectures."""
    kernels = []
    for group in (first_architectures(source), other_architectures(source)):
        if set(group) & set(architectures):
            found = compiled(source, group)
            kernels += parse(found.report, found.listing)
    kernels = [kernel for kernel in kernels if kernel.architecture in architectures]
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture))


@functools.cache
def library_kernels(library: Path, architecture: int) -> list[Kernel]:
    """Every kernel of a compiled library for one architecture."""

    def printed(*options: str) -> str:
        return run_compiler(
            [tool("cuobjdump"), *options, "-arch", f"sm_{architecture}", library]
        ).stdout

    return parse(printed("-res-usage"), "\n".join(shortened(printed("-sass"))))


def parse(report: str, listing: str) -> list[Kernel]:
    """Kernels of a report, ptxas's or that of cuobjdump -res-usage, and cuobjdump's listing."""
    kernels: dict[tuple[str, int], Kernel] = {}
    kernel, architecture = None, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'", line):
            key = (found[1], int(found[2]))
            kernel = kernels[key] = Kernel(key[0], key[1])
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            kernel.stack, kernel.spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
        elif found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.search(r"Function (\w+):", line):
            kernel = kernels[found[1], architecture] = Kernel(found[1], architecture)
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            # A spilled register is in the stack's frame.
            kernel.registers, kernel.stack, kernel.shared, kernel.spills = map(int, found.groups())
    for line in listing.splitlines():
        if found := re.search(r"code for sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.search(r"Function : (\w+)", line):
            kernel = kernels[found[1], architecture]
        elif found := re.search(
            r"/\*([0-9a-f]+)\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*) *(.*?) *; (0x\w+)", line
        ):
            guarded = bool(found[2]) or re.match(r"U?P\d", found[4]) is not None
            kernel.opcodes.append(found[3])
            kernel.lines.append(
                Line(int(found[1], 16), found[3], found[4], int(found[5], 16), guarded)
            )
    names = _demangle(sorted({name for name, _ in kernels}))
    for found in kernels.values():
        found.name = names[found.name]
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, kernel.architecture))


def has_two_tiles(name: str) -> bool:
    """Whether it is a prefill kernel whose warps have 32 query vectors: compute capability 8, 9."""
    return re.search(r"prefill_kernel<\w+, \d+, 2>", name) is not None


def dynamic_shared(name: str) -> int:
    """Bytes that a block requests at its launch, by the kernel's name: see csrc/cuda."""
    if "warpgroup_kernel" in name:
        # Three stages of 128 keys and values, what is known of values, and barriers; items of the
        # consumers and states of the producers; up to a multiple of 1024.
        stages, states = 3 * (2 * 128 * 256 + 4 * 4 + 4 * 8), (256 * 15 + 128 * 7) * 4
        return math.ceil((stages + states) / 1024) * 1024
    found = re.search(r"(decode|prefill)_kernel<\w+, (\d+)(?:, (\d+))?>", name)
    if not found:
        return 0
    head_dim = int(found[2])
    if found[1] == "decode":
        # Sums of all warps in fours, maxima and sums, and the queries.
        tiles, quads = int(found[3]), math.ceil(head_dim / 32)
        return 4 * tiles * (quads * 2 * 32 * 16 + 8 * 8) + 16 * head_dim * tiles
    # Two stages of keys and values, and queries that have no registers: seven eighths of 256 dims,
    # all of two tiles.
    keys = 64 if head_dim <= 64 else 32 if head_dim <= 128 else 16
    queries = 64 * (224 + 8) if head_dim > 128 else 0
    if has_two_tiles(name):
        queries = 128 * (128 + 8)
    return 2 * (2 * 2 * keys * (head_dim + 8) + queries)


def kilobytes(threads: int, levels: Sequence[float]) -> str:
    """Bytes per thread as `least-mean-most` of this number of threads."""
    return "-".join(f"{threads * level / 1024:.0f}" for level in levels)


def occupancy_table(kernels: list[Kernel], threads: dict[str, int]) -> list[str]:
    """Registers, shared memory and residency of each kernel and architecture, as lines of text."""
    lines = [f"{'kernel':56} {'sm':>4} {'regs':>4} {'shared':>6} {'blocks/SM':>9} {'warps/SM':>8} "
             f"{'in flight/SM':>24}  needed (card)"]  # fmt: skip
    cards = collections.defaultdict(list)
    for card in CARDS:
        cards[card.architecture].append(card)
    for kernel in kernels:
        size = next(n for prefix, n in threads.items() if kernel.name.startswith(prefix))
        dynamic = dynamic_shared(kernel.name)
        blocks = kernel.blocks_per_sm(size, dynamic)
        # In a loop least, mean and most, as data allow and as scoreboards have it.
        if "decode" in kernel.name and kernel.has_products():
            levels = [kernel.loop_flight(), kernel.loop_waits()]
        else:
            levels = [(kernel.loads_in_flight(),)]
        in_flight = ", ".join(kilobytes(blocks * size, level) for level in levels)
        needed = ", ".join(
            f"{c.needed_bytes / 1024:.0f} KB ({c.name})" for c in cards[kernel.architecture]
        )
        lines.append(
            f"{kernel.name:56} {kernel.architecture:>4} {kernel.registers:>4} "
            f"{kernel.shared + dynamic:>6} {blocks:>9} {blocks * math.ceil(size / 32):>8} "
            f"{in_flight:>21} KB  {needed}"
        )
    return lines
