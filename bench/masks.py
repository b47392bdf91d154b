"""What a mask costs: bytes moved by building and applying one, counted, not timed.

`python -m bench.masks` takes one attention layer of a left-padded batch, for a decode step and for
a prefill, and counts what each way of masking it loads and stores:

(a) stock transformers (eager): a 4-D mask is built, added to the scores, softmax
(b) `attention_mask` in place of the stock mask, the rest as (a)
(c) `masked_softmax`: the mask is applied inside the softmax and exists nowhere
(d) `ragged_attention`: neither mask nor scores exist

(a) to (c) begin with the scores and end with the weights; (d) begins with queries, keys and values
and ends with the attention, so its reads are mostly keys and values. Torch operations are counted
as they are dispatched: results that are no views are written, arguments are read. The Triton
kernels run in Triton's interpreter, where every load and store is counted, lanes that are masked
off not. Results are compared before they are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import describe_run

KIB = 1024
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
DTYPE = torch.float16


@dataclass
class Traffic:
    """Bytes of one way, apart: until the mask stands, and after it."""

    mask_written: int = 0
    written: int = 0
    read: int = 0
    in_mask: bool = field(default=False, repr=False)

    def store(self, count: int) -> None:
        self.written += count
        self.mask_written += count if self.in_mask else 0

    @contextlib.contextmanager
    def building_mask(self) -> Iterator[None]:
        self.in_mask = True
        yield
        self.in_mask = False


class CountTorch(TorchDispatchMode):
    """Counts what torch operations read and write."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        owned = {x.untyped_storage().data_ptr() for x in inputs}
        results = result if isinstance(result, (tuple, list)) else (result,)
        writes = [
            x for x in results
            if isinstance(x, torch.Tensor)
            and (x.untyped_storage().data_ptr() not in owned or function._schema.is_mutable)
        ]  # fmt: skip
        # A view moves nothing; memory that is only reserved is counted when it is filled.
        if writes and "empty" not in function._schema.name:
            self.traffic.store(sum(x.nbytes for x in writes))
            self.traffic.read += sum(x.nbytes for x in inputs)
        return result


@contextlib.contextmanager
def count_triton(traffic: Traffic) -> Iterator[None]:
    """Counts what kernels load and store in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store = Builder.create_masked_load, Builder.create_masked_store

    def lanes(pointers, mask):
        return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, pointers, mask, *rest):
        traffic.read += lanes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        traffic.store(lanes(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
    try:
        yield
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


class Problem:
    """Keys, values and queries of a left-padded batch whose rows end in the last column."""

    def __init__(self, lengths: list[int], query_length: int, key_length: int):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(DTYPE)

        self.rows, self.query_length, self.key_length = len(lengths), query_length, key_length
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.starts = key_length - self.lengths
        self.query = normal(self.rows, HEADS, query_length, HEAD_DIM)
        self.keys = normal(self.rows, KV_HEADS, key_length, HEAD_DIM)
        self.values = normal(self.rows, KV_HEADS, key_length, HEAD_DIM)
        columns = torch.arange(key_length)
        self.padding_mask = (columns >= self.starts[:, None]).long()
        keys = self.keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
        self.scores = (self.query @ keys.transpose(2, 3)) * HEAD_DIM**-0.5
        # Of a row shorter than the batch's queries, the first ones are padding.
        offset = torch.arange(query_length)
        self.is_query = offset >= query_length - self.lengths[:, None]

    def attend(self, weights: torch.Tensor) -> torch.Tensor:
        return weights @ self.values.repeat_interleave(HEADS // KV_HEADS, dim=1)


def stock_mask(problem: Problem) -> Callable[[], torch.Tensor]:
    """What makes the mask of transformers' Llama for eager attention, ready to be called."""
    from transformers import DynamicCache, LlamaConfig
    from transformers.masking_utils import create_causal_mask

    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )
    config._attn_implementation = "eager"
    past = problem.key_length - problem.query_length
    cache = DynamicCache(config=config)
    if past:
        cache.update(problem.keys[:, :, :past], problem.values[:, :, :past], 0)
    embeds = problem.query.new_empty(problem.rows, problem.query_length, HEADS * HEAD_DIM)
    return lambda: create_causal_mask(config, embeds, problem.padding_mask, cache)


def softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As transformers' eager attention."""
    return torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(scores.dtype)


def measure(problem: Problem) -> dict[str, Traffic]:
    """Runs the four ways, compares their attention, and returns what they moved."""
    import baton_kernels.triton as kernels

    ways = {name: Traffic() for name in "abcd"}
    make_stock = stock_mask(problem)
    with CountTorch(ways["a"]):
        with ways["a"].building_mask():
            stock = make_stock()
        weights = softmax(problem.scores, stock)
    expected = problem.attend(weights)

    shape = (problem.starts, problem.lengths)
    with ways["b"].building_mask(), count_triton(ways["b"]):
        mask = kernels.attention_mask(
            *shape, problem.query_length, problem.key_length, dtype=problem.scores.dtype
        )
    compare("attention_mask", mask[:, 0][problem.is_query], stock[:, 0][problem.is_query], 0.0)
    with CountTorch(ways["b"]):
        softmax(problem.scores, mask)

    with count_triton(ways["c"]):
        fused = kernels.masked_softmax(problem.scores, *shape)
    real = problem.is_query[:, None, :, None]
    compare("masked_softmax", problem.attend(fused) * real, expected * real, 2e-3)

    # Packed: the queries that are padding are not there.
    packed = problem.query.transpose(1, 2)[problem.is_query]
    counts = problem.is_query.sum(1)
    cu_seqlens = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    slots = torch.arange(problem.rows, dtype=torch.int32)
    with count_triton(ways["d"]):
        out = kernels.ragged_attention(
            packed, problem.keys, problem.values, cu_seqlens, slots, *shape,
            max_query_length=problem.query_length, max_length=int(problem.lengths.max()),
        )  # fmt: skip
    compare("ragged_attention", out, expected.transpose(1, 2)[problem.is_query], 2e-3)
    return ways


def compare(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.float() - expected.float()).abs().max().item()
    if not error <= tolerance:
        sys.exit(f"bench.masks: {name} errs by {error}, more than {tolerance}: nothing is reported")


LABELS = {
    "a": "(a) transformers, 4-D mask",
    "b": "(b) attention_mask",
    "c": "(c) masked_softmax",
    "d": "(d) ragged_attention",
}


def report(title: str, ways: dict[str, Traffic]) -> None:
    print(f"\n{title}")
    print(f"{'':28}{'mask written':>14}{'all written':>14}{'all read':>14}   KiB")
    for name, traffic in ways.items():
        figures = (traffic.mask_written, traffic.written, traffic.read)
        print(f"{LABELS[name]:28}" + "".join(f"{figure / KIB:14.1f}" for figure in figures))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.masks", description=__doc__)
    parser.add_argument("--key-length", type=int, default=1024, help="columns of the decode step")
    parser.add_argument("--prompt", type=int, default=128, help="columns of the prefill")
    arguments = parser.parse_args()
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("bench.masks: triton is imported already; start with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    print(describe_run())
    print(f"one layer, {HEADS} heads, {KV_HEADS} KV heads of {HEAD_DIM}, {DTYPE}; not timed")
    columns = arguments.key_length
    lengths = [max(1, columns * share // 8) for share in range(1, 9)]
    mean = sum(lengths) / len(lengths)
    report(
        f"decode: {len(lengths)} rows of {lengths[0]} to {columns} columns, mean {mean:.0f}",
        measure(Problem(lengths, 1, columns)),
    )
    columns = arguments.prompt
    lengths = [columns, columns * 5 // 8]
    report(
        f"prefill: {len(lengths)} rows of {lengths[1]} and {columns} tokens",
        measure(Problem(lengths, columns, columns)),
    )


if __name__ == "__main__":
    main()
