"""An instruction of PTX, and what executing one needs of the machine."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Instruction:
    guard: str | None  # a predicate, with ! before it when inverted
    opcode: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Type of its operands: the last modifier."""
        return self.modifiers[-1] if self.modifiers else ""


class Lanes(Protocol):
    """The registers of all threads of a launch, its memory, and what was counted so far."""

    count: int
    lane: np.ndarray
    block: np.ndarray
    values: dict[str, np.ndarray]
    parameters: list[str]
    memory: Any
    waited: np.ndarray
    sectors: int
    wavefronts: int
    ideal_wavefronts: int

    def bits(self, operand: str) -> np.ndarray: ...

    def get(self, operand: str, kind: str) -> np.ndarray: ...

    def set(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None: ...
