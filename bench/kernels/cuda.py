"""The GPU as a device of the suite, and the peers that exist there alone.

The cases and the reporting are the CPU's. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from .attention_work import AttentionWork
from .limits import Ceiling
from .measure import Way, describe

# Half a millisecond.
SLEEP_CYCLES = 1_000_000


class Cuda:
    """The current GPU: events for a clock, and the bandwidth of a copy for a ceiling."""

    name = "cuda"
    copier = "device copy"
    gemm_size = 4096
    settle = None  # No way has threads that could take another's cores.

    def __init__(self, num_bytes: int, repeats: int):
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.repeats = repeats
        self._source = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)
        self._flush = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device="cuda")

    def clock(self, call: Callable[[], object]) -> float:
        """Seconds of a call on the GPU, its L2 cache cold."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        # Until the host has launched all of the call: what it takes for that is not the kernels'.
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def ceilings(self, names: Sequence[str]) -> dict[str, Ceiling]:
        """Every memory limit is the bandwidth of a copy, read and written bytes together."""
        return {name: self._ceiling(name) for name in names}

    def _ceiling(self, name: str) -> Ceiling:
        if name.startswith("gemm_"):
            dtype = getattr(torch, name.removeprefix("gemm_"))
            n = self.gemm_size
            a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
            rate = 2 * n**3 / self._seconds(lambda: a @ b) / 1e12
            return Ceiling(name, rate, "TFLOP/s", f"torch matmul of {n} x {n}")
        took = self._seconds(lambda: self._target.copy_(self._source))
        # What a memcpy copies is half of what it moves.
        moved = self._source.nbytes * (1 if name == "memcpy" else 2)
        return Ceiling(name, moved / took / 1e9, "GB/s", "device copy")

    def _seconds(self, call: Callable[[], object]) -> float:
        call()
        return statistics.median(self.clock(call) for _ in range(self.repeats))

    def readers(self, num_bytes: int) -> list[Callable[[], None]]:
        """None: no torch op reads and does nothing else."""
        return []

    def copiers(self, num_bytes: int) -> list[Callable[[], None]]:
        """Calls that copy as many bytes."""
        num_bytes = min(num_bytes, self._source.nbytes)
        target, source = self._target[:num_bytes], self._source[:num_bytes]
        return [functools.partial(target.copy_, source)]

    def copiers_to_new(self, num_bytes: int) -> list[Callable[[], object]]:
        """None: the caching allocator's memory is never new."""
        return []

    @staticmethod
    def release_free_memory() -> None:
        """Allocation costs no copy."""

    @contextlib.contextmanager
    def on_threads(self, count: int) -> Iterator[None]:
        """The host's threads do not matter."""
        yield


def decode_peers(work: AttentionWork) -> list[Way]:
    """flash-attn and FlashInfer, where they are installed."""
    return [
        _installed("flash_attn", "flash-attn, with_kvcache", _flash_attn, work),
        _installed("flashinfer", "FlashInfer, a page per slot", _flashinfer, work),
    ]


def _installed(module: str, name: str, make: Callable, work: AttentionWork) -> Way:
    if importlib.util.find_spec(module) is None:
        return Way(name, missing=f"{module} is not installed")
    try:
        calls = make(work)
        calls[0]()
    except Exception as error:  # whatever it refuses is its answer
        return Way(name, missing=describe(error))
    return Way(name, calls, work.check, reset=work.finite_padding)


def _flash_attn(work: AttentionWork) -> list[Callable]:
    from flash_attn import flash_attn_with_kvcache

    if any(work.starts):
        raise ValueError("rows must begin in column 0")
    query, lengths = work.query[:, None], work.index[2]
    return [
        functools.partial(
            flash_attn_with_kvcache, query, keys.transpose(1, 2), values.transpose(1, 2),
            cache_seqlens=lengths,
        )
        for keys, values in map(work.cache.layer, range(work.layers))
    ]  # fmt: skip


def _flashinfer(work: AttentionWork) -> list[Callable]:
    import flashinfer

    if any(work.starts):
        raise ValueError("rows must begin in column 0")
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    slots, _, lengths = work.index
    heads = work.heads
    wrapper.plan(
        work.cu_seqlens, slots, lengths, heads.query, heads.kv, heads.dim, work.capacity,
        q_data_type=work.dtype, kv_data_type=work.dtype,
    )  # fmt: skip
    return [
        functools.partial(wrapper.run, work.query, work.cache.layer(layer))
        for layer in range(work.layers)
    ]
