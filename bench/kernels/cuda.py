"""The GPU as a device of the suite. Nothing here has run on a GPU yet.

The cases and the reporting are shared with the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from .limits import Ceiling

# The device first waits half a millisecond, so that the host has finished launching when a call
# begins. The time is doubled if that was too short.
SLEEP_CYCLES = 1_000_000
MOST_CYCLES = 256 * SLEEP_CYCLES


class Cuda:
    """The current GPU: events as the clock, and a cold and clean L2 cache before every call.

    Args:
        num_bytes: size of each of the two buffers for measuring ceilings.
        repeats: measurements of each ceiling; the best of several ways to read, the median of each.
    """

    name = "cuda"
    copier = "device copy"
    gemm_size = 4096
    settle = None  # No way has threads that could take another's cores.

    def __init__(self, num_bytes: int, repeats: int):
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.repeats = repeats
        # Random data: zeros and ones can be faster than what is read in practice.
        words = torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda").random_()
        self._words = words
        self._source = words.view(torch.uint8)
        self._target = torch.empty_like(self._source)
        flushed = max(1, min(len(words), 2 * self.cache_bytes // 4))
        self._flush = words[:flushed]
        self._next = 0
        self._cycles = SLEEP_CYCLES

    def clock(self, call: Callable[[], object]) -> float:
        """Seconds of a call on the GPU, with a cold L2 cache.

        The cache is flushed by reading: written data would stay dirty in the cache, and be written
        to memory during the call.
        """
        while True:
            self._flush.sum()
            torch.cuda._sleep(self._cycles)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            # Whether the host had finished launching before the device began; otherwise the device
            # waited for it, and that time does not belong to the kernels.
            launched_first = not begin.query()
            end.synchronize()
            if launched_first or self._cycles >= MOST_CYCLES:
                return begin.elapsed_time(end) / 1e3
            self._cycles *= 2

    def ceilings(self, names: Sequence[str]) -> dict[str, Ceiling]:
        """The named ceilings: read, memcpy, copy, gemm_<dtype>."""
        return {name: self._ceiling(name) for name in names}

    def _ceiling(self, name: str) -> Ceiling:
        if name.startswith("gemm_"):
            dtype = getattr(torch, name.removeprefix("gemm_"))
            n = self.gemm_size
            a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
            rate = 2 * n**3 / self._seconds(lambda: a @ b) / 1e12
            return Ceiling(name, rate, "TFLOP/s", f"torch matmul of {n} x {n}")
        if name == "read":
            took = {
                how: self._seconds(functools.partial(read, self._words))
                for how, read in readers().items()
            }
            best = min(took, key=took.get)
            return Ceiling(name, self._source.nbytes / took[best] / 1e9, "GB/s", best)
        took = self._seconds(lambda: self._target.copy_(self._source))
        # A memcpy is rated by the bytes it copies, which is half of what it moves.
        moved = self._source.nbytes * (1 if name == "memcpy" else 2)
        return Ceiling(name, moved / took / 1e9, "GB/s", "device copy")

    def _seconds(self, call: Callable[[], object]) -> float:
        call()
        return statistics.median(self.clock(call) for _ in range(self.repeats))

    def readers(self, num_bytes: int) -> list[Callable[[], object]]:
        """Calls that read this number of bytes of cold memory, each time at another place."""
        read = next(iter(readers().values()))
        words = max(1, min(num_bytes // 4, len(self._words)))

        def call() -> object:
            place = self._next if self._next + words <= len(self._words) else 0
            self._next = place + words
            return read(self._words[place : place + words])

        return [call]

    def copiers(self, num_bytes: int) -> list[Callable[[], None]]:
        """Calls that copy this number of bytes."""
        num_bytes = min(num_bytes, self._source.nbytes)
        target, source = self._target[:num_bytes], self._source[:num_bytes]
        return [functools.partial(target.copy_, source)]

    def copiers_to_new(self, num_bytes: int) -> list[Callable[[], object]]:
        """None, because the caching allocator's memory is never new."""
        return []

    @staticmethod
    def release_free_memory() -> None:
        """Does nothing, because allocation does not involve a copy."""

    @contextlib.contextmanager
    def on_threads(self, count: int) -> Iterator[None]:
        """Does nothing, because the host's threads do not matter."""
        yield


def readers() -> dict[str, Callable[[torch.Tensor], object]]:
    """Ways to only read int32 words, by name; usually the first is the best."""
    found = {}
    if importlib.util.find_spec("triton") is not None and torch.cuda.is_initialized():
        from .cuda_read import read

        found["read kernel"] = read
    return found | {"torch sum": lambda words: words.view(torch.float32).sum()}
