"""How many tokens a forward has best, when prompts share it with the queries that decode.

Few tokens make a forward that reads the weights for little; many make the running queries wait for
prompts that a few steps later would do as well. In between, the time per query is nearly the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LARGEST = 8192
# How much more time per query a smaller forward may take.
SLACK = 0.025


def frugal_tokens(
    seconds: Callable[[int], float], num_slots: int, prompt: float, answer: float
) -> int:
    """The fewest tokens of a forward at which the time per query is nearly the least.

    With c prompt tokens in a forward and all slots taken, a query has one for `prompt / c`
    forwards, at least 1, and for answer - 1 more. So r queries end per forward, r (answer - 1)
    queries decode in it, and the time per query is that of a forward by r.

    Args:
        seconds: of a forward, by its tokens.
        num_slots: of the relay.
        prompt, answer: tokens of a query, in the mean.
    """
    sizes = [4]
    while sizes[-1] < LARGEST:
        sizes.append(max(sizes[-1] + 1, sizes[-1] * 9 // 8))
    chunk = np.array(sizes, dtype=float)
    rate = _queries_per_forward(num_slots, prompt, answer, chunk)
    decoders = rate * (answer - 1)
    tokens = chunk + decoders
    # Between two sizes a straight line is as good as what is known of the costs.
    known = np.array([0, *sizes, sizes[-1] + num_slots], dtype=float)
    line = np.array([seconds(int(size)) for size in known])
    # Forwards that have a part of a prompt are full, the others only decode.
    share = np.minimum(1.0, rate * prompt / chunk)
    full = np.interp(tokens, known, line)
    plain = np.interp(np.maximum(decoders, 1.0), known, line)
    each = (share * full + (1 - share) * plain) / rate
    return round(float(tokens[np.argmax(each <= (1 + SLACK) * each.min())]))


def _queries_per_forward(
    num_slots: int, prompt: float, answer: float, chunk: np.ndarray
) -> np.ndarray:
    """Prompts are computed one after the other, so that the next one waits in its slot."""
    alone = np.maximum(1.0, prompt / chunk)
    most = chunk / prompt
    rate = np.minimum(num_slots / (alone + answer - 1), most)
    for _ in range(4):
        # As in a queue with one server whose service takes always as long.
        busy = np.minimum(0.95, rate * prompt / chunk)
        wait = np.minimum(num_slots / 2, busy / (2 * (1 - busy)))
        rate = (rate + np.minimum(num_slots / (alone * (1 + wait) + answer - 1), most)) / 2
    return rate
