"""The work of a forward, and its predicted time: costs that are fitted while forwards run."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from ..query import Query

# Numbers of tokens between which a forward's time is linear: a matrix product reads the same
# weights for one row as for a few, and its speed changes with the number of rows.
KNOTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# The weight of a forward relative to the next one of similar size: about 200 of them count.
# Forwards of other sizes keep their weight, because nothing newer is known about those sizes.
FORGET = 0.995
# The number of forwards that have to be seen before anything is predicted.
FEWEST = 8
# The share of the last forward's error that the scale adopts: nearly all of it within 30 forwards.
FOLLOW = 0.1
# A prior that counts as long as no forward contradicts it, and its share of a forward's weight:
# neighboring slopes are similar, and a quarter of the time is spent even without tokens. As a
# result, smaller forwards are tried first, for which no query waits long.
PRIOR, BASE_SHARE = 0.02, 0.25
# The spread is taken from this many forwards; this many of them may take longer than it says.
SPREAD_OF, SPREAD_LEAVES = 128, 1


class Work(NamedTuple):
    """The work of one forward.

    Attributes:
        tokens: token slots in the linear layers, including padding.
        rows: queries for which it computes logits.
        decode_rows: those of them that decode one token.
        decode_columns: cached columns that decoding rows read, including padding.
        prefill_columns: cached columns that prefilling rows read.
        pairs: query-key pairs in the attention of prefilling rows.
    """

    tokens: int = 0
    rows: int = 0
    decode_rows: int = 0
    decode_columns: int = 0
    prefill_columns: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, chunks: Collection[tuple[Query, int]], decoders: Collection[Query]) -> Work:
        """The work of a packed forward.

        Args:
            chunks: queries, and how many tokens of their prompts are computed.
            decoders: queries that compute one token.
        """
        prompt_tokens = sum(count for _, count in chunks)
        return cls(
            tokens=prompt_tokens + len(decoders),
            rows=len(chunks) + len(decoders),
            decode_rows=len(decoders),
            decode_columns=sum(query.cached + 1 for query in decoders),
            prefill_columns=sum(query.cached + count for query, count in chunks),
            pairs=sum(count * query.cached + count * (count + 1) // 2 for query, count in chunks),
        )

    def plus(self, other: Work) -> Work:
        """The work of both in one forward."""
        return Work(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


class FittedCosts:
    """Predicts the seconds of a forward from those seen so far.

    `seconds = scale x (base + sum of slope_k tokens_k + a rows + b decode_columns + c pairs)`

    where tokens_k are the tokens between two of `KNOTS`. All parameters but the scale minimize the
    squared relative error under the constraint that they are not negative. A forward counts less
    the more forwards of its size came after it. The scale follows the last forwards, so that a
    machine that slows down is noticed before the other parameters have been fitted again.

    Attributes:
        ready: whether enough forwards have been seen.
        version: changes whenever a parameter other than the scale does.
        smallest, largest: the tokens of the smallest and largest fitted forward.
    """

    def __init__(self) -> None:
        self.ready = False
        self.version = 0
        self.smallest, self.largest = 0, 0
        self._smallest, self._largest = sys.maxsize, 0
        self._size = 1 + len(KNOTS) + 1 + 3
        # Per segment of `KNOTS`: the triangle that summarizes all rows of its least squares
        # problem, including the target; their total weight; and the rows that are not in it yet.
        self._triangles = [np.zeros((0, self._size + 1)) for _ in range(len(KNOTS) + 1)]
        self._weights = [0.0] * (len(KNOTS) + 1)
        self._pending: list[list[list[float]]] = [[] for _ in range(len(KNOTS) + 1)]
        self._count = 0
        self._scale = 1.0
        self._solution = np.zeros(self._size)
        # The same as seconds at 0 tokens and at every knot, the slopes behind, and the other costs.
        self._at = [0.0] * (len(KNOTS) + 1)
        self._slopes = [0.0] * (len(KNOTS) + 1)
        self._rest = (0.0, 0.0, 0.0)
        self._ratios: deque[float] = deque(maxlen=SPREAD_OF)

    def seconds(self, work: Work) -> float:
        """The predicted seconds of a forward; 0 before any has been fitted."""
        return self._scale * self._shape(work)

    @property
    def spread(self) -> float:
        """The factor by which forwards exceed the prediction at most, except for one in a hundred;
        at least 1."""
        if len(self._ratios) < SPREAD_OF // 4:
            return max([1.0, *self._ratios])
        return max(1.0, sorted(self._ratios)[-1 - SPREAD_LEAVES])

    def observe(self, work: Work, seconds: float) -> None:
        """A forward of that work took this long."""
        if seconds <= 0:
            return
        self._smallest = min(self._smallest, work.tokens)
        self._largest = max(self._largest, work.tokens)
        if self.ready:
            ratio = seconds / max(1e-12, self._shape(work))
            self._ratios.append(ratio / self._scale)
            if self._count >= 4 * FEWEST:
                # One forward that was interrupted for long does not mean another machine.
                limited = min(max(ratio, 0.5 * self._scale), 2 * self._scale)
                self._scale += FOLLOW * (limited - self._scale)
        # The relative error is features / seconds x coefficients - 1.
        relative = [feature * self._scale / seconds for feature in _features(work)]
        self._pending[bisect_left(KNOTS, work.tokens)].append([*relative, 1.0])
        self._count += 1
        # Often at first, when every forward adds information.
        if FEWEST <= self._count <= 2 * FEWEST or self._count % FEWEST == 0:
            self._fit()

    def _shape(self, work: Work) -> float:
        tokens = work.tokens
        index = bisect_left(KNOTS, tokens)
        below = KNOTS[index - 1] if index else 0
        row, column, pair = self._rest
        return (
            self._at[index]
            + self._slopes[index] * (tokens - below)
            + row * work.rows
            + column * work.decode_columns
            + pair * work.pairs
        )

    def _fit(self) -> None:
        for index, pending in enumerate(self._pending):
            if pending:
                decay = FORGET ** len(pending)
                ages = FORGET ** np.arange(len(pending))[::-1]
                self._weights[index] = decay * self._weights[index] + float(ages.sum())
                rows = np.sqrt(ages)[:, None] * np.array(pending)
                stacked = np.vstack([np.sqrt(decay) * self._triangles[index], rows])
                self._triangles[index] = _triangle(stacked)
                pending.clear()
        triangle = _triangle(np.vstack(self._triangles))
        problem = self._with_prior(triangle[:, :-1], triangle[:, -1])
        self._solution = nonnegative_least_squares(*problem, start=self._solution)
        found = self._solution.tolist()
        base, self._slopes, rest = found[0], found[1:-3], found[-3:]
        self._rest = (rest[0], rest[1], rest[2])
        self._at = [base]
        for below, knot, slope in zip((0, *KNOTS), KNOTS, self._slopes, strict=False):
            self._at.append(self._at[-1] + (knot - below) * slope)
        self.version += 1
        self.smallest, self.largest = self._smallest, self._largest
        self.ready = True

    def _with_prior(self, matrix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds the prior to the least squares problem; it decides what the data leave open."""
        # A coefficient of 1 / size would explain all the time of the forwards seen.
        size = np.linalg.norm(matrix, axis=0) / np.sqrt(sum(self._weights))
        alike = np.zeros((len(KNOTS), self._size))
        for index, width in enumerate(np.diff((0, *KNOTS))):
            alike[index, 1 + index : 3 + index] = width * size[0], -width * size[0]
        shares = np.diag(size)[[0, -3, -2, -1]]
        wanted = np.concatenate([np.zeros(len(KNOTS)), [BASE_SHARE, 0, 0, 0]])
        prior = np.sqrt(PRIOR)
        return (
            np.vstack([matrix, prior * alike, prior * shares]),
            np.concatenate([target, prior * wanted]),
        )


def _triangle(rows: np.ndarray) -> np.ndarray:
    """An equivalent least squares problem with as few rows as it has columns."""
    return np.linalg.qr(rows)[1]


def _features(work: Work) -> list[float]:
    """The summands of the seconds, in the order of the coefficients."""
    features, below = [1.0], 0
    for knot in KNOTS:
        features.append(float(min(max(work.tokens - below, 0), knot - below)))
        below = knot
    features.append(float(max(work.tokens - below, 0)))
    return [*features, float(work.rows), float(work.decode_columns), float(work.pairs)]


def nonnegative_least_squares(
    matrix: np.ndarray, target: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """`x >= 0` that minimizes `|matrix x - target|`, by the active set method.

    Args:
        matrix: [rows, n].
        target: [rows].
        start: a first guess, >= 0; one near the solution saves most of the time.

    Source: Lawson and Hanson, Solving Least Squares Problems, chapter 23.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    solution = np.zeros(matrix.shape[1]) if start is None else start * scale
    free = solution > 0
    # Each round frees one coefficient. Rounding could free and bind the last one forever.
    for _ in range(3 * len(solution)):
        while free.any():
            trial = np.zeros_like(solution)
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                solution = trial
                break
            # Moves towards the trial until a coefficient reaches 0; it then stays there.
            steps = solution[negative] / (solution[negative] - trial[negative])
            solution = solution + steps.min() * (trial - solution)
            free &= solution > 1e-15
            solution[~free] = 0.0
        gradient = scaled.T @ (target - scaled @ solution)
        gradient[free] = 0.0
        if gradient.max() <= 1e-9:
            break
        free[gradient.argmax()] = True
    return solution / scale
