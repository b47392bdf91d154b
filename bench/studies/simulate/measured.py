"""The cost of a forward, fitted to forwards of a real model on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from baton_engines.llama.packed_batch import PackedBatch
from baton_engines.policies import Work
from baton_engines.policies.costs import nonnegative_least_squares

from .costs import Cost

# Numbers of tokens between which the time of the linear layers is linear. Every few rows, a matrix
# product has another speed; it reads the same weights for one row as for many.
KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Row(NamedTuple):
    """One query of a forward: `count` tokens are computed after `cached` ones."""

    cached: int
    count: int
    decodes: bool


class Sample(NamedTuple):
    """A forward and its measured seconds."""

    work: Work
    seconds: float


def work_of(rows: Sequence[Row]) -> Work:
    """The work of a forward of these rows without padding."""
    decode = [row for row in rows if row.decodes]
    prefill = [row for row in rows if not row.decodes]
    return Work(
        tokens=sum(row.count for row in rows),
        rows=len(rows),
        decode_rows=len(decode),
        decode_columns=sum(row.cached + row.count for row in decode),
        prefill_columns=sum(row.cached + row.count for row in prefill),
        pairs=sum(row.count * row.cached + row.count * (row.count + 1) // 2 for row in prefill),
    )


@dataclass(frozen=True)
class Measured:
    """Seconds as a linear function of what a forward computes.

    `seconds = line(tokens) + a rows + b decode_columns + c pairs`, where `line` is piecewise linear
    between knots and continues with its last slope. A forward is assumed to use the whole machine,
    so two at a time take as long as one after the other.

    Attributes:
        tokens: the knots: those of `KNOTS` that a sample reaches.
        knots: seconds at each of them.
        per_row, per_column, per_pair: seconds.
        copy_bandwidth: bytes per second of a copy.
        bytes_per_token: of keys and values.
        error: median relative error over the samples of the fit.
    """

    tokens: tuple[int, ...]
    knots: tuple[float, ...]
    per_row: float
    per_column: float
    per_pair: float
    copy_bandwidth: float
    bytes_per_token: float
    error: float = 0.0

    def forward(self, work: Work) -> Cost:
        """The cost of one forward."""
        weights = _weights(work.tokens, self.tokens)
        line = sum(weight * at for weight, at in zip(weights, self.knots, strict=True))
        rest = (
            self.per_row * work.rows
            + self.per_column * work.decode_columns
            + self.per_pair * work.pairs
        )
        return Cost(line + rest)

    def copy(self, num_bytes: float) -> float:
        """Seconds to read and write."""
        return num_bytes / self.copy_bandwidth

    def slower(self, factor: float) -> Measured:
        """The same machine when everything takes `factor` times as long."""
        return replace(
            self,
            knots=tuple(factor * seconds for seconds in self.knots),
            per_row=factor * self.per_row,
            per_column=factor * self.per_column,
            per_pair=factor * self.per_pair,
            copy_bandwidth=self.copy_bandwidth / factor,
        )


def _weights(tokens: int, knots: Sequence[int]) -> list[float]:
    """The weight of each knot for that number of tokens; they add up to 1."""
    weights = [0.0] * len(knots)
    index = 0
    while index < len(knots) - 2 and tokens > knots[index + 1]:
        index += 1
    share = (tokens - knots[index]) / (knots[index + 1] - knots[index])
    weights[index], weights[index + 1] = 1 - share, share
    return weights


def fit(samples: Sequence[Sample], *, copy_bandwidth: float, bytes_per_token: float) -> Measured:
    """Least squares of the relative error, with no coefficient below 0."""
    largest = max(sample.work.tokens for sample in samples)
    tokens = tuple(knot for knot in KNOTS if knot <= largest)
    features = np.array(
        [
            [*_weights(work.tokens, tokens), work.rows, work.decode_columns, work.pairs]
            for work, _ in samples
        ],
        dtype=float,
    )
    seconds = np.array([sample.seconds for sample in samples])
    relative = features / seconds[:, None]
    coefficients = nonnegative_least_squares(relative, np.ones(len(samples)))
    predicted = features @ coefficients
    *knots, per_row, per_column, per_pair = coefficients.tolist()
    return Measured(
        tokens,
        tuple(knots),
        per_row,
        per_column,
        per_pair,
        copy_bandwidth,
        bytes_per_token,
        error=float(np.median(np.abs(predicted / seconds - 1))),
    )


def calibration_rows(max_rows: int, max_length: int) -> list[list[Row]]:
    """Forwards whose times distinguish the coefficients: decoding, prefilling, and both."""
    forwards = []
    count = 1
    while count <= max_rows:
        for cached in (16, max_length // 2, max_length - 1):
            forwards.append([Row(cached, 1, True)] * count)
        count *= 2
    tokens = 2
    while tokens <= 4 * max_length:
        forwards.append(_newcomers(tokens, max_length))
        forwards.append(_newcomers(tokens, min(max_length, tokens // 2)))
        tokens *= 2
    for cached in (max_length // 4, max_length // 2):
        forwards.append([Row(cached, min(64, max_length // 4), False)])
        decoders = [Row(cached, 1, True)] * max(1, max_rows // 2)
        forwards.append([Row(0, min(96, max_length), False), *decoders])
    return forwards


def _newcomers(tokens: int, longest: int) -> list[Row]:
    """Queries of at most `longest` prompt tokens, `tokens` in all."""
    whole, rest = divmod(tokens, longest)
    return [Row(0, longest, False)] * whole + [Row(0, rest, False)] * (rest > 0)


def calibrate(
    patched: Any,
    *,
    max_rows: int,
    max_length: int,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 3,
) -> tuple[Measured, list[Sample]]:
    """Times forwards of a patched model and fits them.

    Args:
        patched: a `PatchedLlama`.
        max_rows: the most rows that a forward will have.
        max_length: the longest query.
        clock: seconds.
        repeats: measurements of every forward, in rounds; the median counts.

    Returns:
        The cost model, and the samples that it was fitted to.
    """
    forwards = calibration_rows(max_rows, max_length)
    times: list[list[float]] = [[] for _ in forwards]
    order = list(range(len(forwards)))
    shuffle = random.Random(0).shuffle
    cache = patched.new_cache(max(map(len, forwards)), max_length + 1)
    try:
        for repeat in range(repeats + 1):
            # A different order each time, so that no forward always follows the same one.
            shuffle(order)
            for index in order:
                seconds = _time_forward(patched, cache, forwards[index], clock)
                # The first round warms up.
                if repeat:
                    times[index].append(seconds)
        bandwidth = _copy_bandwidth(clock, cache.keys.device)
        samples = [
            Sample(work_of(rows), median(measured))
            for rows, measured in zip(forwards, times, strict=True)
        ]
        return fit(
            samples, copy_bandwidth=bandwidth, bytes_per_token=cache.bytes_per_token
        ), samples
    finally:
        cache.release()


def drift(
    patched: Any,
    cost: Measured,
    *,
    max_rows: int,
    max_length: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How much slower the machine is than at calibration, from a few forwards that are timed
    again."""
    probes = [
        [Row(max_length // 2, 1, True)] * max_rows,
        [Row(max_length // 2, 1, True)] * max(1, max_rows // 2),
        _newcomers(max_length, max_length),
        _newcomers(max_length, max(1, max_length // 2)),
    ]
    cache = patched.new_cache(max(map(len, probes)), max_length + 1)
    try:
        ratios = [
            _time_forward(patched, cache, rows, clock) / cost.forward(work_of(rows)).seconds
            for rows in probes * 2
        ]
        return median(ratios)
    finally:
        cache.release()


def _time_forward(patched: Any, cache: Any, rows: Sequence[Row], clock) -> float:
    slots = [cache.allocate(row.cached + row.count) for row in rows]
    try:
        device = cache.keys.device
        begin = clock()
        batch = PackedBatch.from_shape(cache.shape, slots, [row.count for row in rows], device)
        tokens = torch.arange(batch.total_tokens, device=device) % patched.vocab_size
        # Waits for the device, because the choices are needed here.
        patched.forward(tokens, batch, cache, logits="last").argmax(dim=-1).tolist()
        return clock() - begin
    finally:
        for slot in slots:
            cache.free(slot)


def _copy_bandwidth(clock: Callable[[], float], device: torch.device) -> float:
    # Larger than the device's caches.
    source = torch.ones(
        1 << (28 if device.type == "cuda" else 24), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)

    def copied() -> float:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    copied()
    begin = copied()
    for _ in range(8):
        copied()
    return 8 * source.numel() / max(clock() - begin, 1e-9)
