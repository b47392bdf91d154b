"""Decode steps of unmodified transformers models, by attention implementation and cache.

Every row of a batch is left-padded, as `generate` does it. All sides have the same random keys and
values, decode the same tokens and take turns step by step, so that a busy moment affects all of
them. In float32, a different token ends the benchmark before any figure is printed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch._dynamo.exc import Unsupported
from torch._inductor.exc import InductorError
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from baton_engines.huggingface import accelerate, cache_argument, slot_cache
from baton_engines.llama.load import load_model

from .. import spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The sizes of a 0.6B and a 1B model with few layers: attention, cache and projections have their
# usual shares of a step. One in six layers of Gemma 3 has no sliding window.
RANDOM = {
    "qwen3": ("Qwen3", "Config", {"num_hidden_layers": 4}),
    "gemma3": ("Gemma3", "TextConfig", {"num_hidden_layers": 6, "sliding_window": 512}),
}
_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Side:
    """One way to decode.

    Attributes:
        attention: attention implementation.
        cache: dynamic, static or slot.
        compiled: whether the step goes through torch.compile.
        packed: whether the model's linear layers are packed (`accelerate`).
    """

    attention: str
    cache: str
    compiled: bool = False
    packed: bool = False

    @property
    def key(self) -> str:
        """The name on the command line."""
        return f"{self.attention}/{self.cache}" + ("/packed" if self.packed else "")

    @property
    def name(self) -> str:
        """The name in tables."""
        marks = (", packed" if self.packed else "") + (", compiled" if self.compiled else "")
        return f"{self.attention}, {self.cache} cache{marks}"


BASELINES = {"dynamic": Side("sdpa", "dynamic"), "static": Side("sdpa", "static")}
SIDES = [
    BASELINES["dynamic"],
    Side("eager", "dynamic"),
    Side("baton", "dynamic"),
    BASELINES["static"],
    Side("baton", "static"),
    Side("baton", "slot"),
    Side("baton", "slot", packed=True),
]
# FlexAttention compiles its kernel in any case.
COMPILED = [Side("flex_attention", "static"), Side("flex_attention", "static", True)]
COMPILED += [Side("sdpa", "static", True)]
COMPILED += [Side("baton", "static", True), Side("baton", "slot", True)]
COMPILED += [Side("baton", "slot", True, packed=True)]


@dataclass
class Decoder:
    """A batch that decodes in one way.

    Attributes:
        prepare: sets the model up for this side, before a step.
        seconds: of each timed step.
        tokens: `[rows]` of each step.
    """

    side: Side
    prepare: Callable[[], None]
    step: Callable[[], torch.Tensor]
    cache_bytes: Callable[[], int]
    seconds: list[float] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)


def make_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """SmolLM2-135M, or a random decoder of another kind."""
    if name not in RANDOM:
        return load_model(name, dtype=dtype)[0].eval()
    prefix, text, changes = RANDOM[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}{text}")(**{**_SIZES, **changes})
    return getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()


def row_lengths(rows: int, columns: int) -> list[int]:
    """Evenly spaced lengths, from a quarter of the columns to all of them."""
    return [columns * (rows + 3 * row) // (4 * rows - 3) for row in range(rows)]


def make_cache(model: PreTrainedModel, kind: str, capacity: int) -> Cache:
    """An empty cache of a kind."""
    if kind == "slot":
        return slot_cache(model, capacity)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=capacity)
    return DynamicCache(config=model.config)


def fill(caches: Sequence[Cache], model: PreTrainedModel, rows: int, tokens: int) -> None:
    """Writes the same random keys and values into all caches, as a prefill of `tokens` would."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    generator = torch.Generator().manual_seed(0)
    # Repeats a few hundred random columns: as good for attention, and made within seconds.
    sizes = (2, rows, config.num_key_value_heads, min(tokens, 509), head_dim)
    for layer in range(config.num_hidden_layers):
        few = torch.randn(sizes, generator=generator).to(model.dtype)
        key, value = few.repeat(1, 1, 1, -(-tokens // sizes[3]), 1)[:, :, :, :tokens]
        for cache in caches:
            cache.update(key, value, layer)


def make_decoder(
    model: PreTrainedModel,
    side: Side,
    cache: Cache,
    rows: int,
    tokens: int,
    steps: int,
    capacity: int,
) -> Decoder:
    """A batch whose cache holds `tokens` columns, ready to decode `steps` more."""
    name = cache_argument(model)
    lengths = torch.tensor(row_lengths(rows, tokens))
    # As long as the static caches, so that no shape changes in a compiled step.
    width = tokens + steps if side.cache == "dynamic" else capacity
    mask = (torch.arange(width) >= (tokens - lengths)[:, None]).long()
    mask[:, tokens:] = 0
    state = {"token": torch.arange(rows)[:, None] + 5, "column": tokens}

    def forward(token, seen, positions):
        return model(token, attention_mask=seen, position_ids=positions, **{name: cache}).logits

    run = forward
    if side.compiled:
        torch.compiler.reset()
        run = torch.compile(forward, fullgraph=True)

    def prepare() -> None:
        # Iterates over all modules, which a user's step does not do.
        if model.config._attn_implementation != side.attention:
            model.set_attn_implementation(side.attention)

    def step() -> torch.Tensor:
        column = state["column"]
        mask[:, column] = 1
        seen = mask[:, : column + 1] if side.cache == "dynamic" else mask
        positions = (lengths + column - tokens)[:, None]
        state["token"] = run(state["token"], seen, positions)[:, -1].argmax(-1, keepdim=True)
        state["column"] = column + 1
        return state["token"][:, 0]

    def cache_bytes() -> int:
        if side.cache == "slot":
            return sum(layer.bytes_committed for layer in cache.layers)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    return Decoder(side, prepare, step, cache_bytes)


@torch.inference_mode()
def measure(
    model: PreTrainedModel, sides: Sequence[Side], rows: int, tokens: int, steps: int, capacity: int
) -> list[Decoder]:
    """Times the steps of all sides in turns.

    Raises:
        SystemExit: float32 tokens differ.
    """
    warm_up = 2
    decoders = []
    packed = model
    if any(side.packed for side in sides):
        packed = copy.deepcopy(model)
        accelerate(packed)
    caches = [make_cache(model, side.cache, capacity) for side in sides]
    fill(caches, model, rows, tokens)
    for side, cache in zip(sides, caches, strict=True):
        its = packed if side.packed else model
        decoder = make_decoder(its, side, cache, rows, tokens, steps + warm_up, capacity)
        # A step must be compiled while its own attention implementation is set.
        decoder.prepare()
        try:
            decoder.tokens += [decoder.step() for _ in range(warm_up)]
        except (Unsupported, InductorError) as error:
            print(f"{side.name}: left out, not to be compiled: {str(error).splitlines()[0]}")
            continue
        decoders.append(decoder)
    for _ in range(steps):
        for decoder in decoders:
            decoder.prepare()
            begin = time.perf_counter()
            token = decoder.step()
            decoder.seconds.append(time.perf_counter() - begin)
            decoder.tokens.append(token)
    if model.dtype == torch.float32:
        for decoder in decoders[1:]:
            if not torch.equal(torch.stack(decoder.tokens), torch.stack(decoders[0].tokens)):
                raise SystemExit(f"{decoder.side.name}: float32 tokens differ from sdpa's")
    return decoders


def ratios(decoder: Decoder, baseline: Decoder) -> list[float]:
    """The baseline's time divided by the decoder's, step by step."""
    return [a / b for a, b in zip(baseline.seconds, decoder.seconds, strict=True)]


def affordable(
    sides: Sequence[Side], model: PreTrainedModel, rows: int, columns: int
) -> list[Side]:
    """The sides whose caches fit into memory together; dynamic ones are dropped first, except
    sdpa's."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    each = 2 * rows * columns * config.num_key_value_heads * head_dim * model.dtype.itemsize
    each *= config.num_hidden_layers
    room = int(0.7 * psutil.virtual_memory().available / each)
    last = sorted(sides, key=lambda side: side.cache == "dynamic" and side.attention != "sdpa")
    last.sort(key=lambda side: side not in BASELINES.values() and not side.packed)
    kept = set(last[:room])
    return [side for side in sides if side in kept]


def to_records(decoders: Sequence[Decoder]) -> list[dict]:
    """Medians in milliseconds, ratios to sdpa with the same kind of cache, and the caches'
    bytes."""
    by_side = {decoder.side: decoder for decoder in decoders}
    records = []
    for decoder in decoders:
        # A slot cache is compared with both of transformers' own kinds.
        kinds = ["dynamic", "static"] if decoder.side.cache == "slot" else [decoder.side.cache]
        records.append(
            {
                "side": decoder.side.name,
                "ms": 1e3 * statistics.median(decoder.seconds),
                "cache_mib": decoder.cache_bytes() / 2**20,
                "ratios": {
                    BASELINES[kind].name: ratios(decoder, by_side[BASELINES[kind]])
                    for kind in kinds
                    if BASELINES[kind] in by_side and decoder.side != BASELINES[kind]
                },
            }
        )
    return records


def show(title: str, records: Sequence[dict]) -> None:
    """One table."""
    table = Table(title=title, title_justify="left")
    for name in ("attention, cache", "ms per step", "cache MiB", "times as fast as"):
        table.add_column(name)
    for record in records:
        against = [f"{spread(values)} {name}" for name, values in record["ratios"].items()]
        table.add_row(
            record["side"],
            f"{record['ms']:.1f}",
            f"{record['cache_mib']:.0f}",
            "\n".join(against),
        )
    Console(width=110).print(table)
