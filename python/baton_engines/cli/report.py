"""Output of the command line: progress, summaries, comparisons of two runs, build information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


# Key of Relay.summary(), label, format, and how to read the ratio of two runs: larger is better:
# +1, smaller is better: -1, no ratio: 0.
ROWS = (
    ("queries", "queries", _count, 0),
    ("output_tokens", "output tokens", _count, 0),
    ("steps", "decode steps", _count, 0),
    ("slot_idle", "idle: slots", _share, 0),
    ("seconds", "wall time", _seconds, -1),
    ("queries_per_second", "queries/s", _number, 1),
    ("output_tokens_per_second", "output tokens/s", _number, 1),
    ("ttft_p50", "time to first token, p50", _seconds, -1),
    ("ttft_p99", "time to first token, p99", _seconds, -1),
    ("time_per_token_p50", "time per token, p50", _seconds, -1),
    ("time_per_token_p99", "time per token, p99", _seconds, -1),
    ("slot_prefilling", "slots: prefill elsewhere", _share, 0),
    ("prefill_stall", "idle: prefill stall", _share, 0),
    ("joint_padding", "idle: joint-forward padding", _share, 0),
    ("cache_padding_read", "idle: cache padding read", _share, 0),
)


def summary_table(
    summaries: Mapping[str, Mapping[str, Any]], *, ratio_of: tuple[str, str] | None = None
) -> Table:
    """One column per run; with `ratio_of = (a, b)` also how many times better b is than a."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    if ratio_of is not None:
        table.add_column("ratio", justify="right", style="bold")
    for key, label, form, better in ROWS:
        values = [summary.get(key) for summary in summaries.values()]
        if all(value is None for value in values):
            continue
        cells = [label, *(form(value) for value in values)]
        if ratio_of is not None:
            old, new = (summaries[name].get(key) for name in ratio_of)
            if better and old and new:
                cells.append(f"{(new / old) ** better:.2f}x")
            else:
                cells.append("")
        table.add_row(*cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def info_tables(info: Mapping[str, Any], packages: Mapping[str, str]) -> list[Table | Text]:
    """`baton_kernels.build_info()` as tables: versions, instruction sets, and where each op runs.

    Args:
        info: the result of build_info().
        packages: versions of other packages, by name.
    """
    about = _table("versions", "what", "version")
    cpu = info["cpu"]
    known = {name: value for name, value in info.items() if isinstance(value, (str, int))}
    cuda = info["cuda"]
    known = {
        "baton_kernels": known.pop("version"),
        **known,
        "machine": cpu["machine"],
        "CUDA kernels": f"no: {cuda['why_not']}" if cuda["why_not"] else (
            f"{', '.join(cuda['architectures'])} and newer (CUDA {cuda['toolkit']})"
        ),
        **packages,
    }  # fmt: skip
    for name, value in known.items():
        about.add_row(name, Text(str(value)))

    isa = _table("instruction sets", "set", "compiled in", "found here", "used")
    compiled, found = list(cpu["isa_compiled"]), list(cpu["isa_found"])
    for name in [*compiled, *(n for n in found if n not in compiled)]:
        marks = (name in compiled, name in found, name == cpu["isa_used"])
        isa.add_row(name, *("yes" if mark else "-" for mark in marks))

    devices = list(dict.fromkeys(device for where in info["ops"].values() for device in where))
    labels = {"cpu": "CPU", "cuda": "CUDA", "triton": "Triton"}
    ops = _table("ops", "op", *(labels.get(device, device) for device in devices))
    reasons: dict[str, int] = {}
    for op, where in info["ops"].items():
        cells = []
        for device in devices:
            answer, _, reason = str(where.get(device, "-")).partition(": ")
            if reason:
                # The same reason holds for many ops, so it becomes a note that is printed once.
                answer += f" [{reasons.setdefault(reason, len(reasons) + 1)}]"
            cells.append(Text(answer))
        ops.add_row(op, *cells)
    notes = [Text(f"[{number}] {reason}") for reason, number in reasons.items()]
    return [about, isa, ops, *notes]


class RunProgress:
    """Live line of one run: queries done, tokens/s, slots busy. Off a terminal, only its name."""

    def __init__(self, console: Any, name: str, total: int, *, enabled: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "queries, {task.fields[rate]:,.0f} tokens/s, slots busy {task.fields[busy]}"
            ),
            TimeElapsedColumn(),
            console=console,
            # Rich would send results that are piped elsewhere to the terminal instead.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (enabled and console.is_terminal),
        )
        if enabled and not console.is_terminal:
            console.print(f"{name}: {total} queries", highlight=False)
        self._task = self._progress.add_task(name, total=total, rate=0.0, busy="0")

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def console(self) -> Any | None:
        """Where lines can be printed above the live line; None when none is drawn."""
        return None if self._progress.disable else self._progress.console

    def update(
        self, queries: Sequence[Any], done: int, tokens_per_second: float, slots: int
    ) -> None:
        """Shows the state of a run: `queries` are those not done, `done` counts the others."""
        busy = sum(query.status == "running" for query in queries)
        self._progress.update(
            self._task, completed=done, rate=tokens_per_second, busy=f"{busy}/{slots}"
        )


class ConsoleStream:
    """Byte stream onto a rich console, for lines that share a terminal with a live display."""

    def __init__(self, console: Any) -> None:
        self._console = console

    def write(self, data: bytes) -> None:
        """Prints text unchanged: without markup, colors or line breaks of rich."""
        self._console.out(data.decode(), end="", highlight=False)

    def flush(self) -> None:
        """Does nothing: output is not buffered."""
