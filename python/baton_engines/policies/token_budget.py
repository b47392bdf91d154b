"""The best number of tokens in a forward in which prompts share it with decoding queries.

With few tokens a forward reads the weights for little work; with many, running queries wait for
prompts that could just as well be computed a few steps later. In between, the time per query hardly
changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SMALLEST, LARGEST = 4, 8192
# The share by which a smaller forward may increase the time per query.
SLACK = 0.025
# The share of the least time per token that more tokens per forward could save at most.
WASTE = 0.04


def frugal_tokens(
    seconds: Callable[[int], float], num_slots: int, prompt: float, answer: float
) -> int:
    """The smallest number of tokens per forward at which the time per query is nearly minimal.

    With c prompt tokens per forward and all slots taken, a query computes its prompt in
    `prompt / c` forwards (at least 1) and its answer in answer - 1 more. If r queries end per
    forward, r (answer - 1) queries decode in it, and the time per query is a forward's time / r.

    Args:
        seconds: the time of a forward as a function of its tokens.
        num_slots: of the relay.
        prompt, answer: the mean number of tokens of a query.
    """
    sizes = _sizes()
    chunk = np.array(sizes, dtype=float)
    rate = _queries_per_forward(num_slots, prompt, answer, chunk)
    decoders = rate * (answer - 1)
    tokens = chunk + decoders
    # Linear interpolation between two sizes is as good as what is known about the costs.
    known = np.array([0, *sizes, sizes[-1] + num_slots], dtype=float)
    line = np.array([seconds(int(size)) for size in known])
    # Forwards with a part of a prompt are full; the others only decode.
    share = np.minimum(1.0, rate * prompt / chunk)
    full = np.interp(tokens, known, line)
    plain = np.interp(np.maximum(decoders, 1.0), known, line)
    each = (share * full + (1 - share) * plain) / rate
    return round(float(tokens[np.argmax(each <= (1 + SLACK) * each.min())]))


def efficient_tokens(seconds: Callable[[int], float], most: int = LARGEST) -> int:
    """The smallest number of tokens per forward at which the time per token is nearly the least.

    Args:
        seconds: the time of a forward as a function of its tokens.
        most: the most tokens that are considered.
    """
    sizes = [size for size in _sizes() if size <= max(most, SMALLEST)]
    each = np.array([seconds(size) / size for size in sizes])
    return sizes[int(np.argmax(each <= (1 + WASTE) * each.min()))]


def _sizes() -> list[int]:
    """The numbers of tokens that are compared, in steps of an eighth."""
    sizes = [SMALLEST]
    while sizes[-1] < LARGEST:
        sizes.append(max(sizes[-1] + 1, sizes[-1] * 9 // 8))
    return sizes


def _queries_per_forward(
    num_slots: int, prompt: float, answer: float, chunk: np.ndarray
) -> np.ndarray:
    """Prompts are computed one after the other, so the next one waits in its slot."""
    alone = np.maximum(1.0, prompt / chunk)
    most = chunk / prompt
    rate = np.minimum(num_slots / (alone + answer - 1), most)
    for _ in range(4):
        # As in a queue with one server and a constant service time.
        busy = np.minimum(0.95, rate * prompt / chunk)
        wait = np.minimum(num_slots / 2, busy / (2 * (1 - busy)))
        rate = (rate + np.minimum(num_slots / (alone * (1 + wait) + answer - 1), most)) / 2
    return rate
