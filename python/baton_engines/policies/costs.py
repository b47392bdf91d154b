"""What a forward computes, and how long it takes: costs that are fitted while forwards run."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from ..query import Query

# Tokens of a forward between which its seconds are a straight line: a matrix product reads the same
# weights for a few rows as for one, and has another speed for every few rows more.
KNOTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# What a forward weighs compared with the next one of about the same size: some 200 of them count.
# Those of another size still stand, as nothing newer is known of it.
FORGET = 0.995
# Forwards that have to be seen before anything is predicted, and before predictions choose the size
# of a forward.
FEWEST, SETTLED = 8, 32
# How much of the error of the last forward the scale takes over: nearly all of it in 30 forwards.
FOLLOW = 0.1
# What is taken to be so as far as no forward says otherwise, and the share of a forward's weight
# that says it: neighboring slopes are alike, and a quarter of the seconds is there without
# any token. That tries smaller forwards out first, for which nobody waits long.
PRIOR, BASE_SHARE = 0.02, 0.25
# Forwards that the spread is taken of, and how many of them may take longer than it says.
SPREAD_OF, SPREAD_LEAVES = 128, 1


class Work(NamedTuple):
    """What one forward computes.

    Attributes:
        tokens: token slots that go through the linear layers, padding included.
        rows: queries of which it gives logits.
        decode_rows: those of them that decode one token.
        decode_columns: cached columns that decoding rows read, padding included.
        prefill_columns: cached columns that prefilling rows read.
        pairs: query-key pairs of prefilling rows' attention.
    """

    tokens: int = 0
    rows: int = 0
    decode_rows: int = 0
    decode_columns: int = 0
    prefill_columns: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, chunks: Collection[tuple[Query, int]], decoders: Collection[Query]) -> Work:
        """That of a packed forward.

        Args:
            chunks: queries and how many tokens of their prompts are computed.
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
        """Both in one forward."""
        return Work(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


class FittedCosts:
    """Seconds of a forward, by those that have been seen.

    `seconds = scale x (base + sum of slope_k tokens_k + a rows + b decode_columns + c pairs)`

    where tokens_k are the tokens between two of `KNOTS`. All but the scale are non-negative least
    squares of the relative error, in which a forward counts less the more others of its size came
    after it; the scale follows the last forwards, so that a machine that becomes slower is noticed
    before the shape of its costs is known anew.

    Attributes:
        ready: whether enough forwards have been seen.
        version: changes whenever the shape of the costs does; the scale does not count.
        smallest, largest: tokens of the forwards that have been fitted.
    """

    def __init__(self) -> None:
        self.ready = False
        self.version = 0
        self.smallest, self.largest = 0, 0
        self._smallest, self._largest = sys.maxsize, 0
        self._size = 1 + len(KNOTS) + 1 + 3
        # By segment of `KNOTS`: the triangle that all rows of its least squares problem, target
        # included, come down to; what they weigh; and the rows that are not in it yet.
        self._triangles = [np.zeros((0, self._size + 1)) for _ in range(len(KNOTS) + 1)]
        self._weights = [0.0] * (len(KNOTS) + 1)
        self._pending: list[list[list[float]]] = [[] for _ in range(len(KNOTS) + 1)]
        self._count = 0
        self._scale = 1.0
        self._solution = np.zeros(self._size)
        # The same as seconds at 0 tokens and at every knot, slopes after them, and of the rest.
        self._at = [0.0] * (len(KNOTS) + 1)
        self._slopes = [0.0] * (len(KNOTS) + 1)
        self._rest = (0.0, 0.0, 0.0)
        self._ratios: deque[float] = deque(maxlen=SPREAD_OF)

    @property
    def settled(self) -> bool:
        """Whether so many forwards have been seen that the next ones change little."""
        return self._count >= SETTLED

    def seconds(self, work: Work) -> float:
        """Of a forward; 0 before any has been fitted."""
        return self._scale * self._shape(work)

    @property
    def spread(self) -> float:
        """How many times the predicted seconds a forward takes at most, but for one in a hundred;
        at least 1."""
        if len(self._ratios) < SPREAD_OF // 4:
            return max([1.0, *self._ratios])
        return max(1.0, sorted(self._ratios)[-1 - SPREAD_LEAVES])

    def observe(self, work: Work, seconds: float) -> None:
        """A forward of that work took that long."""
        if seconds <= 0:
            return
        self._smallest = min(self._smallest, work.tokens)
        self._largest = max(self._largest, work.tokens)
        if self.ready:
            ratio = seconds / max(1e-12, self._shape(work))
            self._ratios.append(ratio / self._scale)
            if self.settled:
                # One forward that was interrupted for long does not mean another machine.
                limited = min(max(ratio, 0.5 * self._scale), 2 * self._scale)
                self._scale += FOLLOW * (limited - self._scale)
        # The relative error is features / seconds x coefficients - 1.
        relative = [feature * self._scale / seconds for feature in _features(work)]
        self._pending[bisect_left(KNOTS, work.tokens)].append([*relative, 1.0])
        self._count += 1
        # Often at first, when every forward says something new.
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
        """The least squares problem with what is taken to be so as far as it says nothing."""
        # A coefficient of 1 / size makes all the seconds of the forwards that were seen.
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
    """The same least squares problem in as few rows as it has columns."""
    return np.linalg.qr(rows)[1]


def _features(work: Work) -> list[float]:
    """What the seconds are a sum of, by the order of the coefficients."""
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
        start: an x >= 0 to begin at; one that is near to the solution saves most of the time.

    Source: Lawson and Hanson, Solving Least Squares Problems, chapter 23.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    solution = np.zeros(matrix.shape[1]) if start is None else start * scale
    free = solution > 0
    # Every round frees one coefficient; rounding could free and bind the last one for ever.
    for _ in range(3 * len(solution)):
        while free.any():
            trial = np.zeros_like(solution)
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                solution = trial
                break
            # As far towards the trial as all stay at least 0; what is at 0 then stays there.
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
