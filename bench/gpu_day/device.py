"""The device that a stage runs on, and the arguments that every stage has."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from .exits import SKIPPED
from .record import Record

T = TypeVar("T")


class Stage:
    """A stage's device, its record, and the size of its cases.

    Attributes:
        device: "cuda" or "cpu".
        small: whether sizes are those of a test, whose figures mean nothing.
        dtype: of keys, values, weights and activations.
        record: where rows are added.
        model: "1b" or "8b".
    """

    def __init__(self, device: str, record: Record, model: str = "1b"):
        self.device, self.record, self.model = device, record, model
        self.small = device == "cpu"
        self.dtype = torch.float32 if self.small else torch.bfloat16

    def pick(self, full: T, small: T) -> T:
        """The value for this device."""
        return small if self.small else full

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def skip(self, why: str) -> None:
        """Ends the stage, because it cannot run here.

        Raises:
            SystemExit: Always.
        """
        self.record.headline = why
        self.record.save()
        raise SystemExit(SKIPPED)


def run(main: Callable[..., None], *names: str, argv: Sequence[str] | None = None) -> None:
    """Calls `main(stage, *positional)` with the runner's arguments; saves when the time is up.

    Args:
        main: the stage.
        names: of its positional arguments.
        argv: replaces the process's arguments.
    """
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("1b", "8b"), default="1b")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    # A case that runs when the last seconds begin should end by itself.
    record = Record(options.json, options.seconds - min(3.0, options.seconds / 10))
    stage = Stage(options.device, record, options.model)

    def save_and_end(*_: object) -> None:
        record.headline = record.headline or f"ended at its cap with {len(record.rows)} rows"
        record.save()
        sys.exit(1)

    signal.signal(signal.SIGTERM, save_and_end)
    if options.device == "cuda" and not torch.cuda.is_available():
        stage.skip("torch finds no CUDA GPU")
    main(stage, *(getattr(options, name) for name in names))
    record.save()
    if record.errors:
        print(f"without a figure: {', '.join(record.errors)}")
        sys.exit(1)
