"""The same prompts by run_to_completion and by baton, in turns: counts, figures and a picture.

The two policies run the same kernels on the same model in the same process, so they differ only in
how slots are handed on and how prompts are computed. Their answers must be equal token by token.
They take turns of about a second, each with its own clock, so that other work on the machine
affects both alike. baton cuts prompts according to what forwards cost on the machine, so its number
of steps varies a little.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from .clocks import OtherWork, Stopwatch
from .generate import Outcome, RecordRun, submit_records
from .prompts_io import PromptRecord
from .report import RunProgress, summary_table
from .timeline import Panel, draw_timeline, panel_of

POLICIES = ("run_to_completion", "baton")
CAPTIONS = {
    "run_to_completion": "a batch waits for its last query",
    "baton": "a free slot goes to the next query at once",
}
ROUNDS = 3
# No round begins that would end later than this.
MOST_SECONDS = 65.0
# Tokens that a policy generates in one turn: about a second of work.
TURN_TOKENS = 150
# Tokens per query of the warm-up: enough that every kernel and thread has run with every row busy.
WARM_UP_TOKENS = 4
SHOWN_ANSWERS = 5
# If other programs use no more than this share of the CPUs, nothing is said about it.
_QUIET = 0.05


@dataclass
class Run:
    """One policy's work on all records."""

    outcome: Outcome
    summary: dict[str, Any]
    panel: Panel


def introduction(num_records: int, slots: int) -> str:
    """Says in two sentences what the demo shows."""
    return (
        f"Two policies answer the same {num_records} prompts in turns, with the same model and "
        f"kernels, up to {slots} at a time. run_to_completion lets a batch wait for its longest "
        "answer; baton gives a slot to the next prompt as soon as an answer ends."
    )


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
    rounds: int = ROUNDS,
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
        rounds: how many times each policy answers all prompts; fewer where that would take more
            than a minute.

    Returns:
        Whether every query was answered, and alike by both policies.
    """
    others = OtherWork()
    with patch_llama(model) as patched:
        with console.status("warming up"):
            _warm_up(patched, tokenizer, records[:slots], slots, capacity)
        played: list[dict[str, Run]] = []
        begin = time.perf_counter()
        for number in range(rounds):
            taken = time.perf_counter() - begin
            if played and taken / number * (number + 1) > MOST_SECONDS:
                break
            label = f"round {number + 1} of {rounds}"
            with RunProgress(console, label, len(records) * len(POLICIES)) as progress:
                played.append(
                    _play(patched, tokenizer, records, slots, capacity, progress, number % 2)
                )
    busy = others.share()
    setting = (
        f"{len(records)} queries, {slots} slots, {name} in {_dtype_name(model)}, "
        f"CPU threads: {torch.get_num_threads()}"
    )
    picture = output_dir / "timeline.png"
    draw_timeline(
        [played[-1][policy].panel for policy in POLICIES],
        picture,
        title="Who held which slot when",
        note=f"{setting}. Same prompts, same kernels, same answers.",
    )
    outcomes = [one[policy].outcome for one in played for policy in POLICIES]
    answers = output_dir / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in outcomes[-1].results),
        encoding="utf-8",
    )
    console.print(_answers_table(records, outcomes[-1]))
    console.print(f"[bold]{escape(setting)}[/]")
    same = _compare(records, outcomes, console)
    medians = {policy: _medians([one[policy].summary for one in played]) for policy in POLICIES}
    for sentence in _verdict(played, medians):
        console.print(sentence)
    console.print(summary_table(medians, ratio_of=POLICIES))
    if busy is not None and busy > _QUIET:
        console.print(
            f"The machine was busy: other programs used {busy:.0%} of its CPUs meanwhile. That "
            "makes the times longer; the counts are next to what they always are."
        )
    console.print(escape(f"timeline: {picture}\nanswers:  {answers}"), soft_wrap=True)
    return same


def _warm_up(
    patched: Any,
    tokenizer: Any,
    records: Sequence[PromptRecord],
    slots: int,
    capacity: int | None,
) -> None:
    short = [
        replace(record, options={**record.options, "max_new_tokens": WARM_UP_TOKENS})
        for record in records
    ]
    with Relay(patched, slots, capacity, tokenizer=tokenizer) as relay:
        submit_records(relay, short, tokenizer, defaults={})
        relay.run()


def _play(
    patched: Any,
    tokenizer: Any,
    records: Sequence[PromptRecord],
    slots: int,
    capacity: int | None,
    progress: RunProgress,
    first: int,
) -> dict[str, Run]:
    """Answers all records with every policy. The policy that is behind in tokens has the next turn;
    `first` begins."""
    lanes = [_Lane(policy, patched, tokenizer, records, slots, capacity) for policy in POLICIES]
    order = lanes[first:] + lanes[:first]
    mark = 0
    while any(lane.run.open_queries for lane in lanes):
        mark += TURN_TOKENS
        for lane in order:
            lane.go_on(until=mark)
            progress.update(
                [query for one in lanes for query in one.run.open_queries],
                sum(one.run.num_ended for one in lanes),
                lane.relay.summary()["output_tokens_per_second"],
                slots,
            )
        order.reverse()
    return {lane.relay.policy.name: lane.close() for lane in lanes}


class _Lane:
    """One policy with its relay, its queries and its clock."""

    def __init__(
        self,
        policy: str,
        patched: Any,
        tokenizer: Any,
        records: Sequence[PromptRecord],
        slots: int,
        capacity: int | None,
    ) -> None:
        self._clock = Stopwatch()
        self.relay = Relay(patched, slots, capacity, policy, tokenizer=tokenizer, clock=self._clock)
        # Submitting writes the errors it finds into the records, so each run has its own copies.
        own = [replace(record, options=dict(record.options)) for record in records]
        queries = submit_records(self.relay, own, tokenizer, defaults={})
        self.run = RecordRun(self.relay, own, queries, token_ids=True)

    def go_on(self, *, until: int) -> None:
        """Steps until there are `until` output tokens or all queries have ended."""
        with self._clock.running():
            while self.run.open_queries and self.relay.counters.output_tokens < until:
                self.run.step()

    def close(self) -> Run:
        policy = self.relay.policy.name
        run = Run(self.run.outcome, self.relay.summary(), panel_of(self.relay, CAPTIONS[policy]))
        self.relay.close()
        return run


def _medians(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over the rounds."""
    medians = {}
    for key, value in summaries[0].items():
        is_number = isinstance(value, (int, float))
        medians[key] = statistics.median(one[key] for one in summaries) if is_number else value
    return medians


def _verdict(played: Sequence[dict[str, Run]], medians: dict[str, dict[str, Any]]) -> list[str]:
    """The counts that hardly depend on the clock, then those that do."""
    old, new = (medians[policy] for policy in POLICIES)
    sentences = [
        f"[bold]decode steps:[/] {new['steps']:,.0f} by baton, {old['steps']:,.0f} by "
        f"run_to_completion; [bold]idle slots:[/] {new['slot_idle']:.1%} and "
        f"{old['slot_idle']:.1%}"
    ]
    key = "output_tokens_per_second"
    if old[key] and new[key]:
        ratios = sorted(
            one[POLICIES[1]].summary[key] / one[POLICIES[0]].summary[key] for one in played
        )
        sentences.append(
            f"baton gives [bold green]{new[key] / old[key]:.2f}x[/] the output tokens per second "
            f"of run_to_completion: medians of {len(played)} round{'s' * (len(played) > 1)}, which "
            f"gave {ratios[0]:.2f}x to {ratios[-1]:.2f}x"
        )
    return sentences


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _answers_table(records: Sequence[PromptRecord], outcome: Outcome) -> Table:
    """A few answers from all over the list, beginning with those that the model itself ended."""
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
    """Whether all runs completed every answer and the answers are equal; prints the result."""
    for policy, outcome in zip(POLICIES, outcomes, strict=False):
        for error in outcome.errors:
            console.print(f"[red]{policy}: failed:[/] {escape(error)}", soft_wrap=True)
    different = [
        record.id
        for index, record in enumerate(records)
        if any(outcome.results[index] != outcomes[0].results[index] for outcome in outcomes)
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
