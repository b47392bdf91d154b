"""A short GPU session: `python -m bench.gpu_day --minutes M --part PART --output DIR`.

Runs stages in order of importance, each in a process with a time limit. `results.json` in the
output folder contains every stage as soon as it ends; a table comes last. docs/gpu.md says how to
prepare the machine and how to read the record. `--device cpu` tries the stages out on small sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .. import commit
from . import carried
from .runner import Day, table
from .stages import PARTS, STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages: " + "; ".join(f"{s.name} ({s.cap:.0f} s): {s.what}" for s in STAGES),
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages; %(default)s")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[s.name for s in STAGES])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_day", help="folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("1b", "8b"), default="1b", help="of the relay stage")
    parser.add_argument(
        "--carried", type=Path, default=carried.FOLDER, help="what `make gpu-carry` has made"
    )
    # For slow or busy machines, such as those that run the tests.
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the caps")
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> list[Stage]:
    """The stages to run."""
    return [
        dataclasses.replace(stage, cap=options.patience * stage.cap)
        for stage in STAGES
        if (options.part == "all" or options.part in stage.parts)
        and (not options.only or stage.name in options.only)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 if every stage succeeded or had to be left out."""
    options = arguments(argv)
    output = options.output.resolve()
    os.chdir(ROOT)
    begin = time.monotonic()
    environment = carried.environment(ROOT)
    lines = []
    if options.device == "cuda" and options.carried.is_dir():
        lines = carried.unpack(options.carried, ROOT, environment)
    day = Day(
        output,
        60 * options.minutes - (time.monotonic() - begin),
        ("--device", options.device, "--model", options.model),
        environment,
        {
            "commit": carried.commit(options.carried, commit()),
            "command": " ".join(sys.argv[1:] if argv is None else argv),
            "carried": lines,
        },
    )
    for line in lines:
        print(line, flush=True)
    for stage in chosen(options):
        entry = day.run(stage)
        print(f"{stage.name}: {entry['state']}, {entry['seconds']} s", flush=True)
    text = table(day.results)
    (output / "table.txt").write_text(text + "\n")
    print(f"\n{text}")
    good = ("ok", "skipped", "no time")
    return 0 if all(entry["state"] in good for entry in day.results) else 1


if __name__ == "__main__":
    sys.exit(main())
