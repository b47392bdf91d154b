"""The main job twice on the same prompts, by run_to_completion and by baton: picture and figures.

The two policies run the same kernels on the same model in the same process, so the difference is
the handing on of slots and nothing else. Their answers must be equal token by token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..llama import patch_llama
from ..relay import Relay
from .generate import Outcome, run_records, submit_records
from .prompts_io import PromptRecord
from .report import RunProgress, summary_table
from .timeline import Panel, draw_timeline, panel_of

POLICIES = ("run_to_completion", "baton")
CAPTIONS = {
    "run_to_completion": "a batch waits for its last query",
    "baton": "a free slot goes to the next query at once",
}
# Tokens per query of the warm-up: enough that every kernel and thread has run with every row busy.
WARM_UP_TOKENS = 4
SHOWN_ANSWERS = 5


def run_demo(
    model: Any,
    tokenizer: Any,
    records: Sequence[PromptRecord],
    *,
    name: str,
    output_dir: Path,
    slots: int,
    capacity: int | None,
    console: Console,
) -> bool:
    """Runs, draws, prints and compares.

    Args:
        model: LlamaForCausalLM. Patched while this runs.
        tokenizer: Hugging Face tokenizer.
        records: prompts, at least one.
        name: what to call the model.
        output_dir: existing folder; timeline.png and answers.jsonl are written there.
        slots, capacity: see Relay.
        console: where to print.

    Returns:
        Whether every query was answered, and alike by both policies.
    """
    with patch_llama(model) as patched:
        with console.status("warming up"):
            _run(patched, tokenizer, records[:slots], "baton", slots, capacity, WARM_UP_TOKENS)
        runs = {}
        for policy in POLICIES:
            with RunProgress(console, policy, len(records)) as progress:
                runs[policy] = _run(
                    patched, tokenizer, records, policy, slots, capacity, progress=progress
                )
    summaries = {policy: summary for policy, (_, summary, _) in runs.items()}
    setting = (
        f"{len(records)} queries, {slots} slots, {name} in {_dtype_name(model)}, "
        f"CPU threads: {torch.get_num_threads()}"
    )
    picture = output_dir / "timeline.png"
    draw_timeline(
        [panel for _, _, panel in runs.values()],
        picture,
        title="Who held which slot when",
        note=f"{setting}. Same prompts, same kernels, same answers.",
    )
    outcomes = [outcome for outcome, _, _ in runs.values()]
    answers = output_dir / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in outcomes[-1].results),
        encoding="utf-8",
    )
    console.print(_answers_table(records, outcomes[-1]))
    console.print(f"[bold]{escape(setting)}[/]")
    console.print(summary_table(summaries, ratio_of=POLICIES))
    rates = [summaries[policy]["output_tokens_per_second"] for policy in POLICIES]
    if all(rates):
        console.print(
            f"baton gives [bold green]{rates[1] / rates[0]:.2f}x[/] the output tokens per second "
            "of run_to_completion"
        )
    console.print(escape(f"timeline: {picture}\nanswers:  {answers}"), soft_wrap=True)
    return _compare(records, outcomes, console)


def _run(
    patched: Any,
    tokenizer: Any,
    records: Sequence[PromptRecord],
    policy: str,
    slots: int,
    capacity: int | None,
    max_new_tokens: int | None = None,
    progress: RunProgress | None = None,
) -> tuple[Outcome, dict[str, Any], Panel]:
    # Submitting writes the errors it finds into the records; each run gets its own.
    records = [replace(record, options=dict(record.options)) for record in records]
    if max_new_tokens is not None:
        for record in records:
            record.options["max_new_tokens"] = max_new_tokens
    with Relay(patched, slots, capacity, policy, tokenizer=tokenizer) as relay:
        queries = submit_records(relay, records, tokenizer, defaults={})

        def show(running: Sequence[Any], done: int, rate: float) -> None:
            if progress is not None:
                progress.update(running, done, rate, slots)

        outcome = run_records(relay, records, queries, on_step=show, token_ids=True)
        return outcome, relay.summary(), panel_of(relay, CAPTIONS[policy])


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _answers_table(records: Sequence[PromptRecord], outcome: Outcome) -> Table:
    """A few answers from all over the list, those that came to their own end first."""
    answered = [i for i, result in enumerate(outcome.results) if "text" in result]
    whole = [i for i in answered if outcome.results[i]["finish_reason"] == "eos"]
    choice = whole if len(whole) >= SHOWN_ANSWERS else answered
    step = max(1, len(choice) // SHOWN_ANSWERS)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("query", justify="right")
    table.add_column("prompt", ratio=2)
    table.add_column("answer", ratio=3)
    for index in choice[::step][:SHOWN_ANSWERS]:
        record = records[index]
        prompt = record.prompt if record.prompt is not None else ""
        if record.messages:
            prompt = str(record.messages[-1]["content"])
        table.add_row(
            str(index + 1),
            Text(_shortened(prompt, 160)),
            Text(_shortened(outcome.results[index]["text"] or "", 360)),
        )
    return table


def _shortened(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[: limit - 3].rstrip()}..."


def _compare(
    records: Sequence[PromptRecord], outcomes: Sequence[Outcome], console: Console
) -> bool:
    for policy, outcome in zip(POLICIES, outcomes, strict=True):
        for error in outcome.errors:
            console.print(f"[red]{policy}: failed:[/] {escape(error)}", soft_wrap=True)
    different = [
        record.id
        for record, old, new in zip(records, outcomes[0].results, outcomes[1].results, strict=True)
        if old != new
    ]
    if different:
        shown = escape(", ".join(str(id) for id in different[:10]))
        console.print(
            f"[bold red]different answers[/] for {len(different)} of {len(records)}: {shown}"
        )
    else:
        tokens = sum(result.get("output_tokens", 0) for result in outcomes[0].results)
        console.print(
            f"[green]same answers:[/] all {tokens:,} tokens of {len(records)} queries are equal"
        )
    return not different and not any(outcome.failed for outcome in outcomes)
