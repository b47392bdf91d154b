"""Options of a run: the cases, and the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from baton_kernels.testing import cpu_threads

from .cuda import Cuda
from .limits import Limits, release_free_memory
from .measure import Effort, Way
from .vllm_peer import Vllm

T = TypeVar("T")


class Cpu:
    """The host: its clock, its ceilings, and the size of its caches."""

    name = "cpu"
    copier = "C memcpy"

    def __init__(self, limits: Limits, cache_bytes: int):
        self.limits, self.cache_bytes = limits, cache_bytes
        self.ceilings = limits.measure

    @staticmethod
    def clock(call: Callable[[], object]) -> float:
        """Seconds that a call takes."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    @staticmethod
    def settle() -> None:
        """Waits until threads that spin after an earlier call have gone to sleep: by default,
        torch's spin for some milliseconds."""
        time.sleep(0.02)

    def readers(self, num_bytes: int) -> list[Callable[[], None]]:
        """Calls that read this number of bytes of cold memory."""
        return [self.limits.read(num_bytes)]

    def copiers(self, num_bytes: int) -> list[Callable[[], None]]:
        """Calls that copy this number of bytes of cold memory with C's memcpy."""
        return [self.limits.memcpy(num_bytes)]

    def copiers_to_new(self, num_bytes: int) -> list[Callable[[], object]]:
        """Calls that copy this number of bytes into memory that they allocate and return."""
        return [self.limits.memcpy_to_new(num_bytes)]

    @staticmethod
    def release_free_memory() -> None:
        """Makes the next allocation return new memory."""
        release_free_memory()

    @staticmethod
    def on_threads(count: int) -> AbstractContextManager[None]:
        return cpu_threads(count)


@dataclass
class Options:
    """Options of a measurement.

    Args:
        device: Where to measure.
        dtypes: Of keys, values and activations.
        threads: Of torch and of the ceilings.
        effort: How long to measure.
        size: "full", "quick", or "tiny": sizes of a test, whose figures mean nothing.
        only: Measure only works whose label contains this.
        with_peers: Whether peers are measured too.
        flex: Whether FlexAttention is one of them; compiling it takes most of a minute per shape.
    """

    device: Cpu | Cuda
    dtypes: tuple[torch.dtype, ...]
    threads: int
    effort: Effort
    size: str = "full"
    only: str = ""
    with_peers: bool = True
    flex: bool = False
    vllm: Vllm = field(default_factory=Vllm)

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def pick(self, full: T, quick: T | None, tiny: T) -> T:
        """The value for this size; a quick run uses the full one if there is no separate one."""
        if self.size == "quick" and quick is not None:
            return quick
        return tiny if self.tiny else full

    def peers(self, make: Callable[[], list[Way]]) -> list[Way]:
        return make() if self.with_peers else []
