"""The command `baton invariance`: sends an engine prompts by themselves and in company, and reports
the differences as a table, a picture and JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from . import options
from .errors import FAILED, CommandError
from .inputs import gather_prompts
from .prompts_io import demo_prompts

if TYPE_CHECKING:
    from ..invariance import AxisResult, Target


class Engine(str, Enum):
    """The engine to test if no URL is given."""

    relay = "relay"
    generate = "generate"
    vllm = "vllm"


class Api(str, Enum):
    """The two forms of OpenAI's interface."""

    completions = "completions"
    chat = "chat"


# The lowest gap that float32 log-probabilities can show is about this.
_FLOOR = -8.0


def invariance(
    url: Annotated[
        str | None,
        typer.Option(help="A server with OpenAI's interface, e.g. `http://localhost:8000/v1`."),
    ] = None,
    api: Annotated[Api, typer.Option(help="Which of the server's interfaces to use.")] = (
        Api.completions
    ),
    engine: Annotated[Engine, typer.Option(help="The engine to test if no URL is given.")] = (
        Engine.relay
    ),
    model: Annotated[
        str,
        typer.Option(
            help="With --url the name that the server knows the model by; otherwise `smollm2`, a "
            "Hugging Face model folder, or a hub id."
        ),
    ] = "smollm2",
    attention: Annotated[
        str | None,
        typer.Option(
            help="attn_implementation of --engine generate, attention_backend of --engine vllm."
        ),
    ] = None,
    prompts: options.PromptsOption = None,
    prompt: options.PromptOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 24,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="A size of batches; may be given several times. Default: 2, 4, 8."
        ),
    ] = None,
    long_words: Annotated[int, typer.Option(min=1, help="Words of a long neighbor.")] = 300,
    slots: options.SlotsOption = 8,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.ThreadsOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write every comparison as JSON.")
    ] = None,
    picture: options.PictureOption = None,
) -> None:
    """Test whether answers depend on the rest of the batch: send the same prompts by themselves and
    together with others, and compare tokens and log-probabilities.

    Answers are greedy. Without prompts, eight of the package's own are used. The exit code is 1 if
    any answer differs in any bit that the engine shows.
    """
    given = prompts is not None or bool(prompt)
    records = gather_prompts(prompts, prompt or []) if given else demo_prompts()[:8]
    unfit = [record for record in records if record.error or record.prompt is None]
    if unfit or not records:
        reason = unfit[0].error or "it has no `prompt`" if unfit else "there is none"
        raise CommandError(f"prompts must be texts; {reason}")
    texts = [record.prompt or "" for record in records]
    sizes = batch_size or [size for size in (2, 4, 8) if size <= len(texts)]
    from ..invariance import audit, make_axes

    try:
        axes = make_axes(texts, max_tokens=max_new_tokens, batch_sizes=sizes, long_words=long_words)
    except ValueError as error:
        raise CommandError(str(error)) from error
    console = Console(highlight=False)
    status = Console(stderr=True, highlight=False)
    target, close = _open_target(
        url, api, engine, model, attention=attention, slots=slots, dtype=dtype, threads=threads
    )
    try:
        results = list(
            audit(
                target,
                texts,
                axes,
                max_tokens=max_new_tokens,
                on_axis=lambda name: status.print(f"asking: {name}"),
            )
        )
    finally:
        close()
    console.print(f"{target.name}: {len(texts)} prompts, compared with each asked by itself")
    console.print(invariance_table(results))
    if output is not None:
        output.write_text(json.dumps(as_json(target.name, texts, results), indent=1) + "\n")
    if picture is not None:
        draw_invariance(target.name, results, picture)
    if any(result.equal < len(result.findings) for result in results):
        raise typer.Exit(FAILED)


def _open_target(
    url: str | None,
    api: Api,
    engine: Engine,
    model: str,
    *,
    attention: str | None,
    slots: int,
    dtype: options.Dtype,
    threads: int | None,
) -> tuple[Target, Callable[[], object]]:
    """The engine, and a function that releases it."""
    if attention is not None and (url is not None or engine is Engine.relay):
        raise CommandError("--attention needs --engine generate or vllm")
    if url is not None:
        from ..invariance.openai_target import OpenAITarget

        key = os.environ.get("OPENAI_API_KEY")
        return OpenAITarget(url, model, api=api.value, key=key), lambda: None
    if engine is Engine.vllm:
        from ..invariance.vllm_target import VllmTarget

        chosen = {} if attention is None else {"attention_backend": attention}
        try:
            return VllmTarget(model, dtype=dtype.value, max_num_seqs=slots, **chosen), lambda: None
        except ImportError as error:
            raise CommandError(f"--engine vllm needs vLLM: {error}") from error
    import torch

    from ..llama import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, dtype=dtype.value)
    if tokenizer is None:
        raise CommandError(f"{model} has no tokenizer")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    if engine is Engine.generate:
        from ..invariance.generate_target import GenerateTarget

        if attention is not None:
            if attention == "baton":
                from .. import huggingface  # noqa: F401  # registers the name
            try:
                loaded.set_attn_implementation(attention)
            except (ValueError, ImportError) as error:
                raise CommandError(f"--attention: {error}") from error
        name = f"generate, {model}, {attention or loaded.config._attn_implementation}"
        return GenerateTarget(loaded, encode, name), lambda: None
    from ..invariance.relay_target import RelayTarget
    from ..relay import Relay

    relay = Relay(loaded, slots, tokenizer=tokenizer)
    return RelayTarget(relay, encode, f"relay, {model}"), relay.close


def invariance_table(results: Sequence[AxisResult]) -> Table:
    """One row per axis."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("asked", "equal bits", "first differing token", "largest logprob difference"):
        table.add_column(name, justify="left" if name == "asked" else "right")
    for result in results:
        if result.unsupported is not None:
            table.add_row(result.name, "-", "-", f"not asked: {result.unsupported}")
            continue
        gap, place = result.largest_gap, result.first_difference
        table.add_row(
            result.name,
            f"{result.equal} of {len(result.findings)}",
            "none" if place is None else str(place),
            "-" if gap is None else f"{gap:.2g}",
        )
    return table


def as_json(name: str, prompts: Sequence[str], results: Sequence[AxisResult]) -> dict[str, Any]:
    """All findings."""
    return {
        "target": name,
        "prompts": list(prompts),
        "axes": [
            {
                "name": result.name,
                "unsupported": result.unsupported,
                "equal": result.equal,
                "first_difference": result.first_difference,
                "largest_gap": result.largest_gap,
                "findings": [
                    {
                        "prompt": finding.prompt,
                        "first_difference": finding.first_difference,
                        "largest_gap": finding.largest_gap,
                        "equal": finding.equal,
                    }
                    for finding in result.findings
                ],
            }
            for result in results
        ],
    }


def draw_invariance(name: str, results: Sequence[AxisResult], path: Path) -> None:
    """Axes by prompts: equal answers are pale gray, others colored by the difference of
    log-probabilities, with the first differing token as a number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    shown = [result for result in results if result.findings]
    columns = max((len(result.findings) for result in shown), default=1)
    figure = Figure(figsize=(3.6 + 0.55 * columns, 1.9 + 0.42 * max(1, len(shown))))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [
        [
            math.nan if finding.equal else max(_FLOOR, math.log10(finding.largest_gap or 1e-30))
            for finding in result.findings
        ]
        for result in shown
    ]
    if values:
        axes.imshow(values, cmap="YlOrRd", vmin=_FLOOR, vmax=0.0, aspect="auto")
        # Equal answers have a separate quiet color, so that they do not look like missing data.
        equal = [[0.0 if math.isnan(value) else math.nan for value in row] for row in values]
        axes.imshow(equal, cmap=ListedColormap(["#DDEFE3"]), aspect="auto")
    for row, result in enumerate(shown):
        for column, finding in enumerate(result.findings):
            text = (
                "="
                if finding.equal
                else ""
                if finding.first_difference is None
                else str(finding.first_difference)
            )
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [result.name for result in shown])
    axes.set_xticks(range(columns), [str(prompt + 1) for prompt in range(columns)])
    axes.set_xlabel("prompt")
    axes.set_title(name, fontsize=10, loc="left")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.text(
        0.01,
        0.01,
        "=: the same bits as by itself. Number: first differing token. "
        "Color: log10 of the largest logprob difference, pale 1e-8 to dark 1.",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
