"""The machine's ceilings: read bandwidth, memcpy, read + write, matrix products.

The system's compiler compiles `limits.cpp` on first use, for this machine only.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.cpp")
BUILD = SOURCE.parents[2] / "build" / "bench"
# (streams that are read side by side, bytes of prefetch distance): the machine's best one is used.
READERS = tuple((streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 1024, 2048, 4096))


@dataclass
class Ceiling:
    """One limit: the median rate in GB/s or TFLOP/s, and the way that reached it."""

    name: str
    rate: float
    unit: str
    how: str


def compiled(source: Path, options: Sequence[str], libraries: Sequence[str]) -> Path:
    """A shared library of one C++ file, compiled if it does not exist yet.

    Raises:
        RuntimeError: There is no C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise RuntimeError("bench.kernels: measuring the limits needs a C++ compiler (set CXX)")
    command = [*compiler.split(), "-std=c++20", "-O3", "-march=native", "-fPIC", *options]
    key = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        scratch = BUILD / f"{source.stem}-{key}-{os.getpid()}"
        made = scratch.with_suffix(".o")
        subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True)
        link = [*compiler.split(), "-shared", str(made), "-o", str(scratch), *libraries]
        subprocess.run(link, check=True)
        made.unlink()
        scratch.rename(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled limits."""
    # If OpenMP is resolved at load time, it is torch's own copy: one pool of threads instead of
    # two.
    own = [] if hasattr(ctypes.CDLL(None), "GOMP_parallel") else ["-fopenmp"]
    target = compiled(SOURCE, ["-fopenmp"], own)
    loaded = ctypes.CDLL(str(target))
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.limits_read.argtypes = [pointer, number, small, small, number]
    loaded.limits_read.restype = ctypes.c_uint64
    for name in ("limits_memcpy", "limits_stream"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [pointer, pointer, number, small], None
    return loaded


def l3_bytes() -> int:
    """Bytes of the last cache level that core 0 sees; 32 MiB if the system does not report it."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def retain_memory() -> None:
    """Makes the C library keep freed memory, as a server's allocator does.

    By default it returns large blocks to the system, so each result would begin with a page fault
    for every 4 KB, which takes longer than the op. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def release_free_memory() -> None:
    """Returns all free memory to the system, so that the next allocation is new memory."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def buffer(num_bytes: int, huge_pages: bool) -> torch.Tensor:
    """Bytes on separate pages, written once, so that every page is mapped."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return tensor.fill_(1)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


class Limits:
    """Measures the CPU's ceilings; tables use their kernels as additional ways.

    Args:
        num_bytes: Size of each of the two buffers; several times the last cache level.
        repeats: Runs of each candidate.
    """

    def __init__(self, num_bytes: int = 1 << 30, repeats: int = 7):
        self.num_bytes, self.repeats = num_bytes, repeats
        self._buffers = {huge: buffer(num_bytes, huge) for huge in (True, False)}
        self._best: dict[tuple[str, int], tuple] = {}
        self._next = 0

    def measure(self, names: Sequence[str]) -> dict[str, Ceiling]:
        """The named ceilings: read, memcpy, copy, gemm_<dtype>; with torch's number of threads."""
        return {name: self._measure(name) for name in names}

    def read(self, num_bytes: int) -> Callable[[], None]:
        """A call that reads `num_bytes` of cold memory in the best known way, each time at another
        place."""
        self._measure_once("read")
        threads = torch.get_num_threads()
        huge, streams, ahead = self._best["read", threads]
        num_bytes = self._whole_lines(num_bytes)
        source, read = self._buffers[huge].data_ptr(), library().limits_read

        def call() -> None:
            read(source + self._place(num_bytes), num_bytes, threads, streams, ahead)

        return call

    def memcpy(self, num_bytes: int) -> Callable[[], None]:
        """A call that copies `num_bytes` of cold memory with C's memcpy."""
        threads, function = torch.get_num_threads(), library().limits_memcpy
        num_bytes = self._whole_lines(num_bytes)
        target, source = (self._buffers[huge].data_ptr() for huge in (False, True))

        def call() -> None:
            place = self._place(num_bytes)
            function(target + place, source + place, num_bytes, threads)

        return call

    def memcpy_to_new(self, num_bytes: int) -> Callable[[], torch.Tensor]:
        """The same, into a tensor that the call allocates and returns."""
        threads, function = torch.get_num_threads(), library().limits_memcpy
        num_bytes, source = self._whole_lines(num_bytes), self._buffers[True].data_ptr()

        def call() -> torch.Tensor:
            target = torch.empty(num_bytes, dtype=torch.uint8)
            function(target.data_ptr(), source + self._place(num_bytes), num_bytes, threads)
            return target

        return call

    def _whole_lines(self, num_bytes: int) -> int:
        if num_bytes > self.num_bytes:
            raise ValueError(f"bench.kernels: {num_bytes} bytes exceed the limits' buffer")
        return -(-num_bytes // 64) * 64

    def _place(self, num_bytes: int) -> int:
        place = self._next if self._next + num_bytes <= self.num_bytes else 0
        self._next = place + num_bytes
        return place

    def _measure_once(self, name: str) -> None:
        if (name, torch.get_num_threads()) not in self._best:
            self._measure(name)

    def _measure(self, name: str) -> Ceiling:
        if name.startswith("gemm_"):
            return self._gemm(name)
        threads = torch.get_num_threads()
        candidates = {"read": self._readers, "memcpy": self._memcpys, "copy": self._copies}[name]()
        # All candidates once per process and number of threads; after that, only the best one.
        known = self._best.get((name, threads))
        if known is not None:
            candidates = {known: candidates[known]}
        took = {key: seconds(call, self.repeats) for key, (call, _) in candidates.items()}
        best = self._best[name, threads] = min(took, key=took.get)
        # A memcpy is rated by the bytes it copies, a copy by those it reads and writes.
        moved = self.num_bytes * (2 if name == "copy" else 1)
        return Ceiling(name, moved / took[best] / 1e9, "GB/s", candidates[best][1])

    def _readers(self) -> dict[tuple, tuple[Callable, str]]:
        read, threads = library().limits_read, torch.get_num_threads()
        return {
            (huge, streams, ahead): (
                functools.partial(read, memory.data_ptr(), self.num_bytes, threads, streams, ahead),
                f"{streams} streams, prefetch {ahead}, {'huge' if huge else 'small'} pages",
            )
            for huge, memory in self._buffers.items()
            for streams, ahead in READERS
        }

    def _memcpys(self) -> dict[tuple, tuple[Callable, str]]:
        return {
            (huge,): (self._copier("limits_memcpy", huge), f"memcpy, {pages} pages")
            for huge, pages in ((False, "small"), (True, "huge"))
        }

    def _copies(self) -> dict[tuple, tuple[Callable, str]]:
        return {
            (function, huge): (self._copier(function, huge), f"{how}, {pages} pages")
            for function, how in (("limits_memcpy", "memcpy"), ("limits_stream", "streaming"))
            for huge, pages in ((False, "small"), (True, "huge"))
        }

    def _copier(self, function: str, huge: bool) -> Callable[[], None]:
        # Within one buffer, so that source and target are on pages of the same size.
        half, base = self.num_bytes // 2, self._buffers[huge].data_ptr()
        threads, copy = torch.get_num_threads(), getattr(library(), function)

        def call() -> None:
            copy(base, base + half, half, threads)
            copy(base + half, base, half, threads)

        return call

    def _gemm(self, name: str) -> Ceiling:
        dtype, threads = getattr(torch, name.removeprefix("gemm_")), torch.get_num_threads()
        # If torch has no fast product for a dtype, the larger size would take minutes.
        known = self._best.get((name, threads))
        sizes = known or tuple(size for size in (256, 1024, 2048) if size**2 <= self.num_bytes)
        best = None
        for size in sizes:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            took = seconds(lambda a=a, b=b: a @ b, self.repeats)
            rate = 2 * size**3 / took / 1e12
            if best is None or rate > best.rate:
                best = Ceiling(name, rate, "TFLOP/s", f"torch matmul of {size} x {size}")
                self._best[name, threads] = (size,)
            if took > 0.2:
                break
        return best
