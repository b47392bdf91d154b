"""The options of the command line: their types, what help says of them, and the checks that refuse
a wrong one before a model is loaded.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


class Dtype(str, Enum):
    """Types a model can be loaded in; auto is the one its weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _check_policy(name: str) -> str:
    # Imported here, as in all checks: help must not wait for torch.
    from ..policies import NAMES

    return _one_of(NAMES, name)


def _check_prefill(mode: str) -> str:
    from ..prefill import NAMES

    return _one_of(NAMES, mode)


def _one_of(names: tuple[str, ...], name: str) -> str:
    if name not in names:
        raise typer.BadParameter(f"must be one of {', '.join(names)}, got {name!r}")
    return name


def _check_picture(path: Path | None) -> Path | None:
    """Refuses before the run what would fail after it."""
    if path is None:
        return None
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise typer.BadParameter(f"must end in {', '.join(PICTURE_SUFFIXES)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")
    return path


ModelOption = Annotated[
    str, typer.Option(help="`smollm2`, a Hugging Face model folder, or a hub id.")
]
SlotsOption = Annotated[int, typer.Option(min=1, help="Queries decoded at the same time.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of weights and cache.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; as many as torch takes when left out.")
]
CapacityOption = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a query, prompt and answer together.")
]

PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file with one query per line (prompt, messages or token_ids; optional id, "
        "priority, stop, n, seed, continue_final_message, and the options of sampling), text file "
        "with one prompt per line, or `-` for standard input."
    ),
]
PromptOption = Annotated[
    list[str] | None, typer.Option(help="A prompt; may be given several times.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="JSONL file for the results; `-` for standard output."),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Append to the results, without the ids that are there already."),
]
TokenIdsOption = Annotated[bool, typer.Option(help="Add token ids to the results.")]
TimelineOption = Annotated[
    Path | None,
    typer.Option(callback=_check_picture, help="Picture of slots over time (png, svg, pdf)."),
]
PictureOption = Annotated[
    Path | None,
    typer.Option(callback=_check_picture, help="Picture of the result (png, svg, pdf)."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Neither progress nor summary.")]

# How queries are batched.
PolicyOption = Annotated[
    str,
    typer.Option(
        callback=_check_policy,
        help="`baton`, `chunked`, `orca`, `padded_orca`, `multi_bin` or `run_to_completion`.",
    ),
]
AdmissionOption = Annotated[
    str | None,
    typer.Option(help="Who enters first: `fcfs`, `shortest`, `length_aware` or `priority`."),
]
MaxStallTokensOption = Annotated[
    int | None, typer.Option(min=1, help="baton: most prompt tokens between two decode steps.")
]
TokenBudgetOption = Annotated[
    int | None, typer.Option(min=1, help="chunked: most tokens of a forward.")
]
BinsOption = Annotated[int | None, typer.Option(min=1, help="multi_bin: bins by `max_new_tokens`.")]
PrefillOption = Annotated[
    str,
    typer.Option(
        callback=_check_prefill,
        help="Where new prompts are computed: `serial`, between two steps; `overlapped`, by a "
        "thread with cores of its own; `apart`, by another process; `ray`, by actors of a Ray "
        "cluster.",
    ),
]
PrefillThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads that prompts take from decoding; default: half."),
]
MaxSlotsOption = Annotated[
    int | None, typer.Option(min=1, help="Slots grow up to this while queries wait.")
]
KvBudgetOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="Most MiB of cached keys and values; queries are parked at it."),
]

# How answers are chosen.
# What is left out is what the model's generation config says.
MaxNewTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Longest answer; 128 if nothing says otherwise.")
]
MinNewTokensOption = Annotated[int | None, typer.Option(min=0, help="Shortest answer.")]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0.0, help="0 takes the likeliest token.")
]
TopPOption = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens that sum to this; 1 for all."),
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, help="Keep this many of the likeliest tokens; 0 for all.")
]
MinPOption = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Keep tokens this times as likely as the likeliest."),
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option(help="As in Hugging Face; 1 for none.")
]
FrequencyPenaltyOption = Annotated[
    float | None, typer.Option(help="Taken off a logit each time that the answer has its token.")
]
PresencePenaltyOption = Annotated[
    float | None, typer.Option(help="Taken off a logit once the answer has its token.")
]
GenerationConfigOption = Annotated[
    bool, typer.Option(help="Follow the model's generation config where no option says otherwise.")
]
NOption = Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")]
LogprobsOption = Annotated[
    int | None,
    typer.Option(min=0, max=100, help="Add logarithms of probabilities, of so many tokens more."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Query i (from 0) samples with seed + i.")]
StopOption = Annotated[
    list[str] | None, typer.Option(help="A text that ends an answer; may be repeated.")
]
ChatOption = Annotated[
    bool, typer.Option(help="Wrap prompts in the tokenizer's chat template, if it has one.")
]


def make_policy(name: str, **options: Any) -> Any:
    """The policy with the options that are not None.

    Raises:
        typer.BadParameter: the policy does not take an option, or not its value.
    """
    from ..policies import get

    try:
        return get(name, **{key: value for key, value in options.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
