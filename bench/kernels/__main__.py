"""Kernels against the machine's limits and against peers: `python -m bench.kernels`.

Every way of doing a piece of work is first checked against float64; then all are timed in turns on
cold data. Shares are relative to a ceiling that is measured in the same run, before and after.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import (
    attention_cases,
    call_cases,
    copy_cases,
    eight_bit_cases,
    figures,
    layer_cases,
    packed_cases,
    paged_cases,
    prefill_cases,
    report,
)
from .cuda import Cuda
from .limits import Limits, l3_bytes, retain_memory
from .measure import Effort, Row, Work, describe, measure
from .options import Cpu, Options

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass
class Case:
    """One table: its works, the ceilings that it is compared with, and the lines below it."""

    works: Callable[[Options], Iterator[Work]]
    ceilings: tuple[str, ...] = ()
    summary: Callable[[list[Row]], list[str]] = lambda rows: []

    @property
    def title(self) -> str:
        return self.works.__doc__.splitlines()[0]


def ceilings(options: Options) -> Iterator[Work]:
    """The machine's highest rates, measured twice."""
    yield from ()


CASES = {
    "ceilings": Case(ceilings, ("read", "memcpy", "copy", "gemm")),
    "decode": Case(attention_cases.decode, ("read",), attention_cases.decode_summary),
    "padding": Case(attention_cases.padding, ("read",), attention_cases.padding_summary),
    "paged": Case(paged_cases.paged, ("read",), paged_cases.paged_summary),
    "prefix": Case(paged_cases.prefix, ("read",), paged_cases.prefix_summary),
    "eight_bit": Case(eight_bit_cases.eight_bit, ("read",), eight_bit_cases.eight_bit_summary),
    "scaling": Case(attention_cases.scaling, (), attention_cases.scaling_summary),
    "prefill": Case(prefill_cases.prefill, ("gemm",)),
    "chunk": Case(prefill_cases.chunk, (), prefill_cases.chunk_summary),
    "mixed": Case(prefill_cases.mixed, (), prefill_cases.mixed_summary),
    "insert": Case(copy_cases.insert, ("memcpy",)),
    "extract": Case(copy_cases.extract, ("memcpy",)),
    "move": Case(copy_cases.move, ("memcpy",)),
    "append": Case(copy_cases.append, (), copy_cases.append_summary),
    "layers": Case(layer_cases.layers, ("copy",)),
    "rows": Case(layer_cases.rows),
    "linear": Case(layer_cases.linear, ("read", "gemm")),
    "packed": Case(packed_cases.packed, (), packed_cases.packed_summary),
    "overhead": Case(call_cases.overhead, (), call_cases.overhead_summary),
    "step": Case(call_cases.step, (), call_cases.step_summary),
}


def run_case(name: str, options: Options) -> tuple[list[Row], list[str]]:
    """Measures one table; returns its rows and the lines below it."""
    case = CASES[name]
    names = [
        one
        for ceiling in case.ceilings
        for one in (
            [f"gemm_{report.dtype_name(d)}" for d in options.dtypes]
            if ceiling == "gemm"
            else [ceiling]
        )
    ]
    before = options.device.ceilings(names)
    rows, lines = [], []
    try:
        for work in case.works(options):
            if options.only not in work.label:
                continue
            threads = torch.get_num_threads()
            device = options.device
            rows += measure(name, work, options.effort, device.clock, threads, device.settle)
    except torch.OutOfMemoryError as error:
        # Too large for this card: the table ends here, but the next ones may fit.
        lines.append(f"ended early: {describe(error)}")
        work = None
        torch.cuda.empty_cache()
    after = options.device.ceilings(names)
    report.add_shares(rows, {one: max(before[one].rate, after[one].rate) for one in names})
    lines += [report.ceiling_line(one, before[one], after[one]) for one in names]
    return rows, [*lines, *case.summary(rows)]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__.splitlines()[0],
        epilog="cases: " + "; ".join(f"{name}: {case.title}" for name, case in CASES.items()),
    )  # fmt: skip
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--only", default="", help="works whose label has this in it")
    parser.add_argument("--threads", type=int, help="torch's own number when left out")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="bfloat16 only, short runs")
    parser.add_argument("--no-peers", action="store_true", help="ours and the limits only")
    parser.add_argument(
        "--flex", action="store_true", help="FlexAttention too; it compiles for minutes"
    )
    parser.add_argument("--json", type=Path, help="write the record of the run here")
    parser.add_argument("--output", type=Path, help="draw the figures into this folder")
    parser.add_argument("--fill", type=Path, help="write the tables into this document")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_options(args: argparse.Namespace) -> Options:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    effort, num_bytes, repeats = Effort(), 1 << 30, 7
    cache_bytes = l3_bytes()
    if args.quick:
        effort, num_bytes, repeats = Effort(0.2, 3, 50), 1 << 30, 3
    if args.tiny:
        effort, num_bytes, repeats = Effort(0.0, 2, 2), 8 << 20, 1
        cache_bytes = 1
    dtypes = args.dtype if args.dtype != list(DTYPES) or not args.quick else ["bfloat16"]
    if args.device == "cuda":
        # Random data, many times as large as the largest L2 cache.
        device = Cuda(num_bytes if args.tiny else 4 << 30, repeats)
    else:
        if not args.tiny:
            retain_memory()
        device = Cpu(Limits(num_bytes, repeats), cache_bytes)
    return Options(
        device,
        tuple(getattr(torch, name) for name in dtypes),
        torch.get_num_threads(),
        effort,
        size="tiny" if args.tiny else "quick" if args.quick else "full",
        only=args.only,
        with_peers=not args.no_peers,
        flex=args.flex,
    )


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if one of our ops was refused."""
    args = arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.kernels: --device cuda needs a GPU that torch can use, and finds none")
    options = make_options(args)
    console = Console(width=None if sys.stdout.isatty() else 160)
    about = report.machine(args.device, options.threads)
    console.print(report.describe(about), markup=False, highlight=False)
    record = {"machine": about, "cases": {}}
    for name in args.case:
        rows, lines = run_case(name, options)
        text = report.markdown(CASES[name].title, rows, lines)
        if args.fill:
            report.fill(args.fill, name, f"{report.describe(about)}\n{text}")
        if args.markdown:
            print(text)
        else:
            report.print_tables(CASES[name].title, rows, lines, console)
        record["cases"][name] = {
            "title": CASES[name].title,
            "rows": [dataclasses.asdict(row) for row in rows],
            "lines": lines,
        }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.output:
        for file in figures.draw(record, args.output):
            print(f"wrote {file}")
    wrong = [
        row
        for case in record["cases"].values()
        for row in case["rows"]
        if row["kind"] == "ours" and row["note"]
    ]
    for row in wrong:
        print(f"{row['work']}, {row['way']}: {row['note']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
