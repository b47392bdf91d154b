"""The options of the command line: types, help texts, and checks that reject a wrong value before
a model is loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


class Dtype(str, Enum):
    """Types that a model can be loaded in; auto is the one that its weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """Types that weights can be rounded to."""

    int8 = "int8"


class KVDtype(str, Enum):
    """Types of keys and values other than the model's own."""

    int8 = "int8"
    float8_e4m3fn = "float8_e4m3fn"


def _check_policy(name: str) -> str:
    # Imported here, as in all checks: help must not have to wait for torch.
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
    """Rejects before the run what would fail after it."""
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
CapacityOption = Annotated[
    int | None, typer.Option(min=1, help="Maximum tokens of a query, prompt and answer together.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of weights and cache.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: torch's number.")
]


PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file with one query per line (prompt, messages or token_ids; optional id, "
        "priority, stop, n, seed, continue_final_message, and the options of sampling), text "
        "file with one prompt per line, or `-` for standard input."
    ),
]
PromptOption = Annotated[
    list[str] | None, typer.Option(help="A prompt; may be given several times.")
]
PictureOption = Annotated[
    Path | None,
    typer.Option(callback=_check_picture, help="Picture of the result (png, svg, pdf)."),
]


@dataclass(frozen=True)
class Queries:
    """Options for the model, the prompts and the file of answers."""

    model: ModelOption = "smollm2"
    prompts: PromptsOption = None
    prompt: PromptOption = None
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSONL file for the results; `-` for standard output."),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Append to the results, and skip ids that they already contain."
        ),
    ] = False


def _bytes(mib: float | None) -> int | None:
    return None if mib is None else int(mib * 2**20)


@dataclass(frozen=True)
class Batching:
    """How queries are batched, and with which cache and cores."""

    slots: SlotsOption = 16
    policy: Annotated[
        str,
        typer.Option(
            callback=_check_policy,
            help="`baton`, `chunked`, `orca`, `padded_orca`, `multi_bin` or `run_to_completion`.",
        ),
    ] = "baton"
    prefill: Annotated[
        str,
        typer.Option(
            callback=_check_prefill,
            help="Where new prompts are computed: `serial`, between two steps; `overlapped`, by a "
            "thread with separate cores; `apart`, by another process; `ray`, by actors of a Ray "
            "cluster.",
        ),
    ] = "serial"
    prefill_threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads that prompts take from decoding; default: half."),
    ] = None
    admission: Annotated[
        str | None,
        typer.Option(
            help="Order in which queries enter: `fcfs`, `shortest`, `length_aware` or `priority`."
        ),
    ] = None
    max_stall_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="baton: maximum prompt tokens that running queries wait for."),
    ] = None
    max_token_gap: Annotated[
        float | None,
        typer.Option(help="baton: maximum predicted seconds between two tokens of a query."),
    ] = None
    join: Annotated[
        str | None,
        typer.Option(
            help="baton: `auto`, new prompts join the running queries' forward; `never`, they are "
            "computed between two steps."
        ),
    ] = None
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="chunked: maximum tokens of a forward.")
    ] = None
    bins: Annotated[
        int | None, typer.Option(min=1, help="multi_bin: bins by `max_new_tokens`.")
    ] = None
    max_slots: Annotated[
        int | None, typer.Option(min=1, help="Add slots up to this number while queries wait.")
    ] = None
    kv_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Maximum MiB of cached keys and values; beyond it, queries are parked."
        ),
    ] = None
    prefix_cache: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Maximum MiB of keys and values kept for prompts with the same beginning."
        ),
    ] = None
    kv_dtype: Annotated[
        KVDtype | None,
        typer.Option(help="8-bit type of cached keys and values, on a CPU."),
    ] = None
    capacity: CapacityOption = None
    dtype: DtypeOption = Dtype.auto
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="`int8`: weights rounded to 8 bits, in half the memory of bfloat16; answers "
            "differ."
        ),
    ] = None
    threads: ThreadsOption = None

    def relay_options(self) -> dict[str, Any]:
        """The options of `Relay`, without capacity and policy.

        Raises:
            ImportError, ValueError: the prefill mode is not available.
        """
        from .. import prefill

        threads = {} if self.prefill_threads is None else {"threads": self.prefill_threads}
        return {
            "num_slots": self.slots,
            "prefill": prefill.get(self.prefill, **threads),
            "max_slots": self.max_slots,
            "kv_budget": _bytes(self.kv_budget),
            "kv_dtype": None if self.kv_dtype is None else self.kv_dtype.value,
            "prefix_cache": _bytes(self.prefix_cache),
            "weight_dtype": None if self.weights is None else self.weights.value,
        }

    def make_policy(self) -> Any:
        """The policy, with the options that were given.

        Raises:
            typer.BadParameter: the policy does not have an option, or rejects its value.
        """
        from ..policies import get

        if self.prefill == "serial" and self.prefill_threads is not None:
            raise typer.BadParameter("--prefill-threads needs --prefill overlapped, apart or ray")
        names = (
            "admission", "max_stall_tokens", "max_token_gap", "join", "token_budget", "bins",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            return get(self.policy, **given)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error


@dataclass(frozen=True)
class Answering:
    """How answers are chosen. The model's generation config fills in options that are left out."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum tokens of an answer; 128 if the generation config has no number."
        ),
    ] = None
    min_new_tokens: Annotated[int | None, typer.Option(min=0, help="Shortest answer.")] = None
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Keep the likeliest tokens that sum to this; 1 for all."
        ),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Keep this many of the likeliest tokens; 0 for all.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Keep tokens at least this fraction as likely as the most likely one.",
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="As in Hugging Face; 1 for none.")
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            help="Subtracted from a token's logit for each time that it is in the answer."
        ),
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted from a token's logit once it is in the answer.")
    ] = None
    generation_config: Annotated[
        bool,
        typer.Option(help="Take options that are not given from the model's generation config."),
    ] = True
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 1
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, max=100, help="Add logarithms of probabilities, and those of this many others."
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Query i (from 0) samples with seed + i.")] = 0
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; may be repeated.")
    ] = None
    chat: Annotated[
        bool, typer.Option(help="Wrap prompts in the tokenizer's chat template, if it has one.")
    ] = True

    def defaults(self) -> dict[str, Any]:
        """Options of `Relay.submit`, and n, for prompts that do not set them."""
        elsewhere = ("generation_config", "seed", "stop", "chat")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in elsewhere}
        return {**given, "stop": tuple(self.stop) if self.stop else None}


@dataclass(frozen=True)
class Reporting:
    """Options for the report about a run."""

    token_ids: Annotated[bool, typer.Option(help="Add token ids to the results.")] = False
    timeline: Annotated[
        Path | None,
        typer.Option(callback=_check_picture, help="Picture of slots over time (png, svg, pdf)."),
    ] = None
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print neither progress nor a summary.")
    ] = False


def of_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Turns a command whose parameters are groups of options into one that takes the options.

    Args:
        command: each parameter is annotated with a dataclass of options.
    """
    groups = get_type_hints(command)
    del groups["return"]
    options = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=get_type_hints(group, include_extras=True)[field.name],
        )
        for group in groups.values()
        for field in fields(group)
    }

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(
            **{
                name: group(**{field.name: given[field.name] for field in fields(group)})
                for name, group in groups.items()
            }
        )

    # Typer reads the options from here.
    run.__signature__ = inspect.Signature([*options.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    return run
