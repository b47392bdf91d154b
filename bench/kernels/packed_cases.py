"""The projections of a layer with packed weights (also in int8), compared with row-major weights,
torch and their limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

import baton_kernels as bk
from baton_kernels import reference
from baton_kernels.reference.linear import linear_int8
from baton_kernels.testing import Accuracy, assert_same_bits

from .layer_cases import normal
from .measure import LIMIT, OURS, PEER, Row, Way, Work
from .options import Options
from .report import dtype_name

# in_features and out_features of a layer's four projections.
MODELS = {
    "SmolLM2-135M": ((576, 960), (576, 576), (576, 3072), (1536, 576)),
    "Llama 1B": ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)),
    "Llama 8B": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
}
PACKED, INT8 = "linear, packed", "linear, packed to int8"
READ, PRODUCTS = "reading the weights, best pages", "same number of products, warm"
Projection = Callable[[torch.Tensor, object], torch.Tensor]


def packed(options: Options) -> Iterator[Work]:
    """linear from packed weights: a layer's projections, weights cold."""
    if options.device.name != "cpu":
        return
    models = options.pick(MODELS, None, {"tiny": ((16, 24), (24, 48))})
    for dtype in options.dtypes:
        for model, sizes in models.items():
            yield from _layer(options, dtype, model, sizes)


def _layer(
    options: Options, dtype: torch.dtype, model: str, sizes: Sequence[tuple[int, int]]
) -> Iterator[Work]:
    one = [normal(options, dtype, outs, ins, seed=i) for i, (ins, outs) in enumerate(sizes)]
    num_bytes = sum(weight.nbytes for weight in one)
    copies = options.pick(4 * options.device.cache_bytes // num_bytes + 1, None, 2)
    plain = [one, *([weight.clone() for weight in one] for _ in range(copies - 1))]
    panels, int8_panels = _packed(plain, None), _packed(plain, torch.int8)
    for rows in options.pick((1, 4, 16, 32, 64, 512), None, (1, 3)):
        x = {ins: normal(options, dtype, rows, ins, seed=9) for ins, _ in sizes}
        last = x[sizes[-1][0]], one[-1]
        truth = Accuracy(reference.linear, *last)
        # Bits are compared, not accuracy, because rounding is part of the computation.
        same = functools.partial(assert_same_bits, linear_int8(*last))
        flops = 2 * rows * sum(weight.numel() for weight in one)

        def ways(function: Projection, layers: list, x: dict = x) -> list[Callable]:
            return [functools.partial(_project, function, x, sizes, layer) for layer in layers]

        yield Work(
            f"{model}, {rows} rows",
            dtype_name(dtype),
            [
                Way(PACKED, ways(bk.linear, panels), truth.check, OURS),
                Way(INT8, ways(bk.linear, int8_panels), same),
                Way("linear, row-major", ways(bk.linear, plain), truth.check, PEER),
                *options.peers(
                    lambda ways=ways, truth=truth: [
                        Way("torch", ways(functional.linear, plain), truth.check)
                    ]
                ),
                Way(READ, options.device.readers(num_bytes), kind=LIMIT),
                Way(PRODUCTS, [_products(options, dtype, flops)], kind=LIMIT),
            ],
            flops=flops,
        )


def _packed(layers: list[list], dtype: torch.dtype | None) -> list[list]:
    size = sum(bk.panel_bytes(weight, dtype=dtype) for weight in layers[0])
    memory = bk.PanelMemory(len(layers) * size)
    return [
        [bk.pack_linear(weight, dtype=dtype, memory=memory) for weight in layer] for layer in layers
    ]


def _project(
    function: Projection, x: dict[int, torch.Tensor], sizes: Sequence[tuple[int, int]], layer: list
) -> torch.Tensor:
    for (ins, _), weight in zip(sizes, layer, strict=True):
        y = function(x[ins], weight)
    return y


def _products(options: Options, dtype: torch.dtype, flops: int) -> Callable[[], None]:
    """About the same number of products, by the same kernel, with all data in the caches."""
    # Enough outputs to give every thread a share whose weights fit its cache.
    rows, ins, outs = 64, 512, options.pick(768 * options.threads, None, 96)
    x = normal(options, dtype, rows, ins)
    weight = bk.pack_linear(normal(options, dtype, outs, ins, seed=1))
    count = max(1, round(flops / (2 * rows * ins * outs)))

    def call() -> None:
        for _ in range(count):
            bk.linear(x, weight)

    return call


def packed_summary(rows: Sequence[Row]) -> list[str]:
    """The share of the limit, which is the longer one of reading and multiplying; and int8."""
    works: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row.median_us:
            works.setdefault((row.dtype, row.work, row.threads), {})[row.way] = row.median_us
    lines = []
    for (dtype, work, _), us in works.items():
        if PACKED in us and READ in us and PRODUCTS in us:
            share = max(us[READ], us[PRODUCTS]) / us[PACKED]
            lines.append(f"{dtype}, {work}: {share:.0%} of the longer limit")
        if PACKED in us and INT8 in us:
            lines.append(f"{dtype}, {work}: int8 {us[PACKED] / us[INT8]:.2f}x as fast")
    return lines
