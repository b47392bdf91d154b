"""What choosing one query's tokens needs to remember: its options, random numbers and rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .logit_rules import LogitRules
from .sampling_options import SamplingOptions


class Sampler:
    """How one query's tokens are chosen: its options, its random numbers, what it has generated.

    Args:
        options: SamplingOptions.
        seed: of the query's own generator; used if the options have none.
        prompt: token ids, which repetition_penalty counts as seen.
        eos: ids that end the query, which min_new_tokens holds back.
    """

    def __init__(
        self,
        options: SamplingOptions,
        seed: int = 0,
        prompt: Sequence[int] = (),
        eos: Iterable[int] = (),
    ):
        self.options = options
        self.seed = seed if options.seed is None else options.seed
        self.rules = LogitRules.of(options, prompt, eos)
        # A generator holds 5 kB, so greedy queries and those that still wait have none.
        self._generator: torch.Generator | None = None
        self._drawn = (-1, 0.0)

    @property
    def greedy(self) -> bool:
        """Whether the token is the arg max, which needs no generator."""
        return self.options.greedy

    @property
    def takes_likeliest(self) -> bool:
        """Whether the arg max of the logits as they are is all that has to be known of them."""
        return self.greedy and self.rules is None and self.options.logprobs is None

    def draw(self, position: int) -> float:
        """The random number in [0, 1) for the query's token number `position`.

        Positions come in order; the newest one may come again, after a step that was
        interrupted.
        """
        if self._generator is None:
            self._generator = torch.Generator("cpu").manual_seed(self.seed)
        if position != self._drawn[0]:
            # From the CPU on every device, independent of torch's default device: a seed means
            # the same everywhere.
            number = torch.rand((), generator=self._generator, dtype=torch.float64, device="cpu")
            self._drawn = (position, number.item())
        return self._drawn[1]
