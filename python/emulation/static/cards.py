"""What devices have: multiprocessors, memory."""

from __future__ import annotations

import dataclasses


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
        """Bytes that must be in flight per multiprocessor to keep memory busy (Little's law)."""
        return self.gigabytes_per_second * self.latency_ns / self.multiprocessors


CARDS = [
    Card("T4", 75, 320, 40, 500),
    Card("A100", 80, 2039, 108, 580),
    Card("H100", 90, 3350, 132, 700),
    Card("B200", 100, 8000, 148, 800),
]
