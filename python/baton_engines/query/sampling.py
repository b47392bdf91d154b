"""Choosing the next token: greedy for all rows at once, or drawn with the query's own generator.

A drawn token is a function of its row's logits, the query's parameters and seed, and how many
tokens the query has drawn: neighbors, slots and pauses do not enter.
"""

import math
import operator

import torch

# Below this a softmax is the arg max in every case that float32 can tell apart, and dividing would
# overflow.
_GREEDY_TEMPERATURE = 1e-6
# Candidates looked at first for top-p: sorting a whole vocabulary costs milliseconds, and the
# nucleus is nearly always smaller.
_NUCLEUS_GUESS = 1024


def greedy(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The arg max of every row, and whether all of the row's logits are finite.

    Args:
        logits: float32 [rows, vocab].
    """
    if not len(logits):
        return [], []
    low, high = torch.aminmax(logits, dim=-1)
    finite = torch.isfinite(low) & torch.isfinite(high)
    return logits.argmax(dim=-1).tolist(), finite.tolist()


def candidates(
    logits: torch.Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn and their probabilities: temperature, then top-k, then top-p.

    Args:
        logits: float32 [vocab], finite.
        temperature: > 0.
        top_k: keep the k largest logits and whatever equals the smallest of them; 0 keeps all.
        top_p: keep a token while the more probable ones sum to less than this; 1.0 keeps all.

    Returns:
        ids int64 [candidates] and probabilities float32 [candidates], summing to 1.
    """
    # The largest logit is taken off first, so that no division by a small temperature overflows at
    # the top.
    scores = (logits.float() - logits.max()) / temperature
    ids = None
    if 0 < top_k < len(scores):
        kth = torch.topk(scores, top_k).values[-1]
        ids = torch.nonzero(scores >= kth).squeeze(1)
        scores = scores[ids]
    probabilities = torch.softmax(scores, dim=-1)
    if top_p < 1.0:
        order, probabilities = _nucleus(probabilities, top_p)
        ids = order if ids is None else ids[order]
        probabilities = probabilities / probabilities.sum()
    if ids is None:
        ids = torch.arange(len(scores), device=scores.device)
    return ids, probabilities


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of the fewest largest probabilities that sum to top_p or more."""
    guess = min(_NUCLEUS_GUESS, len(probabilities))
    values, order = torch.topk(probabilities, guess)
    mass = values.double().cumsum(0)
    if guess < len(probabilities) and mass[-1] < top_p:
        values, order = torch.sort(probabilities, descending=True, stable=True)
        mass = values.double().cumsum(0)
    # A token stays while what stands before it sums to less than top_p; the first one always does.
    count = 1 + int((mass[:-1] < top_p).sum())
    return order[:count], values[:count]


class Sampler:
    """How one query's tokens are chosen.

    Args:
        temperature: 0 is greedy (as is anything under 1e-6).
        top_k: 0 for no limit.
        top_p: in (0, 1].
        seed: of the query's own generator.

    Raises:
        ValueError: a parameter out of its range.
        TypeError: a parameter that is no number.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0):
        self.temperature = _number("temperature", temperature)
        self.top_p = _number("top_p", top_p)
        self.top_k = _integer("top_k", top_k)
        self.seed = _integer("seed", seed)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"submit: temperature must be finite and >= 0, got {temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"submit: top_p must be in (0, 1], got {top_p}")
        if self.top_k < 0:
            raise ValueError(f"submit: top_k must be >= 0, got {top_k}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"submit: seed must be in [0, 2**64), got {seed}")
        # A generator holds 5 kB, so greedy queries and those that still wait have none.
        self._generator: torch.Generator | None = None

    @property
    def greedy(self) -> bool:
        """Whether the token is the arg max, which needs no generator."""
        return self.temperature < _GREEDY_TEMPERATURE

    def sample(self, logits: torch.Tensor) -> int:
        """Draw one token from one row of finite logits, float32 [vocab]."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        ids, probabilities = candidates(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        # One uniform number from the CPU per token, whatever the device: a seed then means the same
        # everywhere.
        draw = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        # float64 sums: in float32 the tail of a large vocabulary would be lost in the rounding.
        mass = probabilities.double().cumsum(0)
        total = mass[-1].item()
        # Rounding could lift the product onto the total, past every candidate.
        threshold = min(total * draw, math.nextafter(total, 0.0))
        return int(ids[torch.searchsorted(mass, threshold, right=True)])


def _number(name: str, value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"submit: {name} must be a number, got {value!r}") from None


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"submit: {name} must be an integer, got {value!r}") from None
