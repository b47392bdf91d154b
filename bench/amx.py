"""Tile instructions of the AMX kernels per useful product: `python -m bench.amx`.

The instructions are counted while the built kernels run on a CPU without AMX, where software
emulates each of them (python/emulation/amx/amx.cpp). Counts are exact; no speed is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch

from baton_kernels import linear, ragged_attention
from baton_kernels.testing import assert_accurate, cpu_threads, random_attention_problem
from bench import describe_run
from emulation import amx


@dataclasses.dataclass(frozen=True)
class Counts:
    """Tile instructions that one call executes, and the multiplications that its result needs."""

    instructions: dict[str, int]
    needed: int

    @property
    def useful(self) -> float:
        """Share of the multiplications in tiles that the result needs."""
        return self.needed / self.instructions["products"]

    def per_product(self, name: str) -> float:
        """Instructions of a kind per tdpbf16ps."""
        return self.instructions[name] / self.instructions["multiplies"]


def count(needed: int, op: Callable, *args: torch.Tensor) -> Counts:
    """Runs an op on emulated tiles with one thread, and checks its result."""
    with cpu_threads(1), amx.entered():
        amx.take_counts()
        result = op(*args)
        amx.check_faults()
        instructions = amx.take_counts()
    assert_accurate(result, op.__name__, *args)
    return Counts(instructions, needed)


def count_linear(rows: int, in_features: int, out_features: int) -> Counts:
    x = torch.randn(rows, in_features).bfloat16()
    weight = torch.randn(out_features, in_features).bfloat16()
    return count(rows * in_features * out_features, linear, x, weight)


def count_attention(tokens: int, length: int, heads: tuple[int, int], head_dim: int) -> Counts:
    """One row with `tokens` query tokens at the end of its `length` columns."""
    problem = random_attention_problem(
        [tokens], [length], num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
        dtype=torch.bfloat16,
    )  # fmt: skip
    seen = sum(range(length - tokens + 1, length + 1))
    return count(2 * seen * heads[0] * head_dim, ragged_attention, *problem.args)


LINEAR = [(1, 576, 1536), (16, 576, 1536), (17, 576, 1536), (96, 576, 1536), (512, 576, 192)]
ATTENTION = [
    ("prefill", 512, 512, (4, 1), 128),
    ("prefill", 512, 512, (3, 1), 64),
    ("chunk at the end", 64, 1024, (4, 1), 128),
    ("decode", 1, 1024, (32, 1), 128),
    ("decode", 1, 1024, (4, 4), 64),
    ("decode", 1, 1024, (32, 8), 128),
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not amx.can_be_emulated():
        raise SystemExit("needs the sources, and a CPU with AVX512-BF16 and without AMX")
    print(describe_run())
    print("useful: share of the tdpbf16ps' multiplications that the result needs;")
    print("loads, stores: of tiles, per tdpbf16ps")
    print(f"{'bfloat16':46} {'tdpbf16ps':>9} {'useful':>7} {'loads':>6} {'stores':>7}")

    def show(what: str, c: Counts) -> None:
        print(
            f"{what:46} {c.instructions['multiplies']:>9} {c.useful:>7.1%} "
            f"{c.per_product('loads'):>6.2f} {c.per_product('stores'):>7.2f}"
        )

    for sizes in LINEAR:
        show("linear {} x {} x {}".format(*sizes), count_linear(*sizes))
    for what, tokens, length, heads, head_dim in ATTENTION:
        name = f"{what}: {tokens} at {length}, {heads[0]}/{heads[1]} x {head_dim}"
        show(name, count_attention(tokens, length, heads, head_dim))


if __name__ == "__main__":
    main()
