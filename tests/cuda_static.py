"""The CUDA kernels compiled for real, for every architecture, and what that says without a GPU:
registers, spills, local memory, instructions, occupancy, bytes in flight.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import hashlib
import math
import re
import subprocess
from pathlib import Path

from cuda_tools import INSTALL, tool, with_includes

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BUILD = ROOT / "build" / "static"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FLAGS = ["-std=c++20", "-O3", "-I", "csrc", "-Xptxas", "-v"]


@dataclasses.dataclass(frozen=True)
class Device:
    """What a multiprocessor holds (CUDA C++ programming guide, compute capabilities)."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


SM = {
    75: Device(32, 16, 64 << 10),
    80: Device(64, 32, 164 << 10),
    86: Device(48, 16, 100 << 10),
    89: Device(48, 24, 100 << 10),
    90: Device(64, 32, 228 << 10),
    100: Device(64, 32, 228 << 10),
    120: Device(48, 24, 100 << 10),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """Data sheet figures of a card; the latency of a load from memory is an assumption."""

    name: str
    architecture: int
    gigabytes_per_second: float
    multiprocessors: int
    latency_ns: float

    @property
    def needed_bytes(self) -> float:
        """Bytes that must be on their way per multiprocessor to keep memory busy (Little's law)."""
        return self.gigabytes_per_second * self.latency_ns / self.multiprocessors


CARDS = [
    Card("T4", 75, 320, 40, 500),
    Card("A100", 80, 2039, 108, 580),
    Card("H100", 90, 3350, 132, 700),
    Card("B200", 100, 8000, 148, 800),
]


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
    # (address, opcode, operands) of the same instructions.
    lines: list[tuple[int, str, str]] = dataclasses.field(default_factory=list, repr=False)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches from its beginning, as `LDG.*128`."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)

    def loads_in_flight(self) -> int:
        """Bytes of the most 16-byte loads between two stores: on their way at once, per thread."""
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

    def loop_flight(self) -> tuple[int, float, int]:
        """Least, mean and most bytes per thread on their way in the longest loop with tensor core
        products: loads of 8 or 16 bytes, from their issue to the first use. The mean is over the
        loop's instructions."""
        place = {address: i for i, (address, _, _) in enumerate(self.lines)}
        loops = []
        for i, (address, opcode, operands) in enumerate(self.lines):
            target = re.search(r"0x([0-9a-f]+)$", operands)
            if opcode.startswith("BRA") and target and int(target[1], 16) < address:
                body = self.lines[place[int(target[1], 16)] : i + 1]
                if any(name.startswith("HMMA") for _, name, _ in body):
                    loops.append(body)
        body = max(loops, key=len)
        flying: dict[int, tuple[int, int]] = {}  # register -> first register and bytes of its load
        levels = []
        for turn in range(2):  # the first finds out what is on its way when the loop begins again
            for _, opcode, operands in body:
                used = set()
                for register, wide in re.findall(r"\bR(\d+)(\.64)?", operands):
                    used |= {int(register), int(register) + bool(wide)}
                if opcode.startswith(("HMMA", "STG", "STS")):
                    # A, or what is stored, takes registers that follow the one named.
                    used |= {r + k for r in set(used) for k in (1, 2, 3)}
                if opcode.startswith("LDG"):
                    size = 16 if ".128" in opcode else 8 if ".64" in opcode else 4
                    first = int(re.match(r"R(\d+)", operands)[1])
                    # Addresses are read, the target is not.
                    used = {int(r) + k for r in re.findall(r"\[R(\d+)", operands) for k in (0, 1)}
                for base in {flying[r] for r in used & flying.keys()}:
                    flying = {r: b for r, b in flying.items() if b != base}
                if opcode.startswith("LDG"):
                    flying |= {first + k: (first, size) for k in range(size // 4)}
                if turn:
                    levels.append(sum(size for _, size in set(flying.values())))
        return min(levels), sum(levels) / len(levels), max(levels)

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
        short[name] = re.sub(r"\((int|bool)\)", "", full).partition("(")[0]
    return short


def _compile(source: Path) -> tuple[str, str]:
    """ptxas's report and the disassembly of a source for all architectures; kept on disk."""
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if not nvcc or not cuobjdump:
        raise FileNotFoundError(
            f"{INSTALL}; cuobjdump: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
        )
    digest = hashlib.sha256(" ".join([nvcc, *FLAGS, *map(str, ARCHITECTURES)]).encode())
    for path in with_includes(source, (ROOT / "csrc",)):
        digest.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    report = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.txt"
    listing, fatbin = report.with_suffix(".sass"), report.with_suffix(".fatbin")
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not listing.exists():
            for old in BUILD.glob(f"{source.stem}-*"):
                old.unlink()
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
            command = [
                nvcc,
                *FLAGS,
                *targets,
                "--threads",
                "2",
                "-fatbin",
                str(source),
                "-o",
                str(fatbin),
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            report.write_text(done.stderr)
            sass = subprocess.run(
                [cuobjdump, "-sass", str(fatbin)], capture_output=True, text=True, check=True
            ).stdout
            # Opcodes are what is asked for; encodings make up most of the text.
            kept = [
                line
                for line in sass.splitlines()
                if re.search(r"Function :|code for|\*/ +\S.*;", line)
            ]
            listing.write_text("\n".join(kept))
            fatbin.unlink()
    return report.read_text(), listing.read_text()


def compile_kernels(source: Path) -> list[Kernel]:
    """Every kernel of a source for every architecture."""
    return parse(*_compile(source))


def parse(report: str, listing: str) -> list[Kernel]:
    """Kernels of ptxas's report and cuobjdump's listing."""
    kernels: dict[tuple[str, int], Kernel] = {}
    kernel = None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", line):
            key = (found[1], int(found[2]))
            kernel = kernels[key] = Kernel(key[0], key[1])
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            kernel.stack, kernel.spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
    architecture = 0
    for line in listing.splitlines():
        if found := re.search(r"code for sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.search(r"Function : (\w+)", line):
            kernel = kernels[found[1], architecture]
        elif found := re.search(
            r"/\*([0-9a-f]+)\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*) *(.*?) *;", line
        ):
            kernel.opcodes.append(found[2])
            kernel.lines.append((int(found[1], 16), found[2], found[3]))
    names = _demangle(sorted({name for name, _ in kernels}))
    for found in kernels.values():
        found.name = names[found.name]
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, kernel.architecture))


def dynamic_shared(name: str) -> int:
    """Bytes that a block asks for at its launch, by the kernel's name: see csrc/cuda."""
    found = re.search(r"(decode|prefill)_kernel<\w+, (\d+)(?:, (\d+))?>", name)
    if not found:
        return 0
    head_dim = int(found[2])
    if found[1] == "decode":
        # Sums of all warps in fours, maxima and sums, and the queries of 256 dims.
        tiles, quads = int(found[3]), math.ceil(head_dim / 32)
        queries = 16 * head_dim if head_dim > 128 else 16
        return 4 * tiles * (quads * 2 * 32 * 16 + 8 * 8) + queries
    # Two stages of keys and values, and three quarters of the queries of 256 dims.
    keys = 64 if head_dim <= 64 else 32 if head_dim <= 128 else 16
    queries = 64 * (192 + 8) if head_dim > 128 else 0
    return 2 * (2 * 2 * keys * (head_dim + 8) + queries)


def occupancy_table(kernels: list[Kernel], threads: dict[str, int]) -> list[str]:
    """Registers, shared memory and residency of each kernel and architecture, as lines of text."""
    lines = [f"{'kernel':56} {'sm':>4} {'regs':>4} {'shared':>6} {'blocks/SM':>9} {'warps/SM':>8} "
             f"{'in flight/SM':>12}  needed (card)"]  # fmt: skip
    cards = collections.defaultdict(list)
    for card in CARDS:
        cards[card.architecture].append(card)
    for kernel in kernels:
        size = next(n for prefix, n in threads.items() if kernel.name.startswith(prefix))
        dynamic = dynamic_shared(kernel.name)
        blocks = kernel.blocks_per_sm(size, dynamic)
        # In a loop least, mean and most: memory must be busy all the time.
        loop = "decode" in kernel.name and kernel.has_products()
        levels = kernel.loop_flight() if loop else (kernel.loads_in_flight(),)
        in_flight = "-".join(f"{blocks * size * level / 1024:.0f}" for level in levels)
        needed = ", ".join(
            f"{c.needed_bytes / 1024:.0f} KB ({c.name})" for c in cards[kernel.architecture]
        )
        lines.append(
            f"{kernel.name:56} {kernel.architecture:>4} {kernel.registers:>4} "
            f"{kernel.shared + dynamic:>6} {blocks:>9} {blocks * math.ceil(size / 32):>8} "
            f"{in_flight:>9} KB  {needed}"
        )
    return lines
