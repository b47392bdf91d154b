"""Unmodified transformers models: decode steps, peak memory, and continuous batching.

    python -m bench.huggingface            all of it but compiled steps
    python -m bench.huggingface --compile  compiled steps as well (minutes for each side)
    python -m bench.huggingface --quick    one model, one size, few steps

`generate_batch` on this package needs `kernels`, which the environments of `make test-engines`
have: `.venv-transformers-5.24/bin/python -m bench.huggingface`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from .. import describe_run
from . import continuous, memory
from .steps import (
    COMPILED,
    DTYPES,
    RANDOM,
    SIDES,
    affordable,
    make_model,
    measure,
    row_lengths,
    show,
    to_records,
)

PARTS = ("steps", "memory", "batch")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.huggingface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["smollm2", *RANDOM])
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side")
    keys = sorted({side.key for side in SIDES + COMPILED})
    parser.add_argument("--sides", nargs="+", choices=keys, default=keys, metavar="ATTENTION/CACHE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--compile", action="store_true", help="compiled steps as well (minutes)")
    parser.add_argument("--quick", action="store_true", help="SmolLM2, 512 columns, 3 steps")
    parser.add_argument("--json", type=Path, help="write the record there")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.models, arguments.columns, arguments.steps = ["smollm2"], [512], 3
    waits = os.environ.get("OMP_WAIT_POLICY", "not set")
    print(f"{describe_run()}\n{arguments.rows} left-padded rows, {arguments.dtype}")
    print(f"torch's threads between its operators: OMP_WAIT_POLICY {waits}")
    sides = SIDES + (COMPILED if arguments.compile else [])
    sides = [side for side in sides if side.key in arguments.sides]
    record: dict = {"run": describe_run(), "dtype": arguments.dtype, "omp_wait_policy": waits}
    for name in arguments.models:
        model = make_model(name, DTYPES[arguments.dtype])
        for columns in arguments.columns if "steps" in arguments.parts else ():
            # A static cache is as large as the longest answer may get; here the columns are full
            # up to a fiftieth.
            tokens = columns - max(columns // 50, arguments.steps + 2)
            kept = affordable(sides, model, arguments.rows, columns)
            for side in sides:
                if side not in kept:
                    print(f"{side.name}, {columns} columns: left out, memory is too small")
            decoders = measure(model, kept, arguments.rows, tokens, arguments.steps, columns)
            records = to_records(decoders)
            mean = sum(row_lengths(arguments.rows, tokens)) / arguments.rows
            show(f"{name}, {columns} columns, rows of {mean:.0f} tokens on average", records)
            case = {"model": name, "columns": columns, "sides": records}
            record.setdefault("steps", []).append(case)
        del model
        columns = min(2048, max(arguments.columns))
        case = {"model": name, "columns": columns}
        if "memory" in arguments.parts:
            keys = [side.key for side in sides if not side.compiled and side.attention != "eager"]
            case["sides"] = memory.measure(name, arguments.dtype, keys, arguments.rows, columns)
            record.setdefault("memory", []).append(case)
    if "batch" in arguments.parts:
        record["generate_batch"] = continuous.measure(
            arguments.models[0], arguments.dtype, runs=1 if arguments.quick else 3
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
