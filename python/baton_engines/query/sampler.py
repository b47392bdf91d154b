"""The state needed for choosing one query's tokens: options, random numbers and rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .logit_rules import LogitRules
from .sampling_options import SamplingOptions


class Sampler:
    """Chooses one query's tokens by its options, random numbers and earlier tokens.

    Args:
        options: SamplingOptions.
        seed: of the query's own generator; used if the options have none.
        prompt: token ids, which repetition_penalty counts as seen.
        eos: ids that end the query, which min_new_tokens excludes at first.
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
        # A generator takes 5 kB, so greedy and waiting queries have none.
        self._generator: torch.Generator | None = None
        self._drawn = (-1, 0.0)

    @property
    def greedy(self) -> bool:
        """Whether the token is the arg max, which needs no generator."""
        return self.options.greedy

    @property
    def takes_likeliest(self) -> bool:
        """Whether only the arg max of the unchanged logits is needed."""
        return self.greedy and self.rules is None and self.options.logprobs is None

    def draw(self, position: int) -> float:
        """The random number in [0, 1) for the query's token number `position`.

        Positions come in order. The newest one may be repeated, after a step that was interrupted.
        """
        if self._generator is None:
            self._generator = torch.Generator("cpu").manual_seed(self.seed)
        if position != self._drawn[0]:
            # Generated on the CPU on every device, independent of torch's default device, so that a
            # seed means the same everywhere.
            number = torch.rand((), generator=self._generator, dtype=torch.float64, device="cpu")
            self._drawn = (position, number.item())
        return self._drawn[1]
