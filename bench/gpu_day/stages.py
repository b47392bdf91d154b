"""The stages of a GPU session, in order of importance."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("correct", "figures")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: in the table and the record.
        cap: seconds after which it is ended.
        parts: which of `PARTS` include it.
        what: its description, for a reader of the table.
        module: of this package, or, if it contains a dot, of another; the stage's name if empty.
        arguments: of the module, after those of every stage.
    """

    name: str
    cap: float
    parts: tuple[str, ...]
    what: str
    module: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> tuple[str, ...]:
        """The module and its arguments, as `python -m` takes them."""
        module = self.module or self.name
        return (module if "." in module else f"bench.gpu_day.{module}", *self.arguments)


CORRECT, FIGURES = (PARTS[0],), (PARTS[1],)
STAGES = (
    Stage("probe", 20, PARTS, "the device, its rates, and each op once against its reference"),
    Stage("ops", 80, CORRECT, "the ops' tests on the CUDA kernels", "op_tests", ("cuda",)),
    Stage("graph", 25, CORRECT, "capture and replay, a cold capture, one step bit by bit"),
    Stage("sanitizer", 60, CORRECT, "memcheck, racecheck, synccheck and initcheck on small calls"),
    Stage("decode", 120, FIGURES, "decode attention as CUDA graphs next to its peers"),
    Stage("copies", 45, FIGURES, "insert, extract, move and append next to a device copy"),
    Stage("linear", 30, FIGURES, "the projections of a 1B's and an 8B's layers next to cuBLAS"),
    Stage("relay", 100, FIGURES, "decode steps, policies, generate and the simulation"),
    Stage("ncu", 40, FIGURES, "hardware counters of four launches"),
    Stage("prefill", 40, FIGURES, "whole prompts next to their peers"),
    Stage("triton", 60, CORRECT, "the ops' tests on the Triton kernels", "op_tests", ("triton",)),
    Stage("amx", 25, CORRECT, "the ops' tests on the host's AMX", "op_tests", ("amx",)),
)
