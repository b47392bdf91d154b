"""A transformers model as a target: `generate` on left-padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .target import Answer, Request, refuse_comings_and_goings


class GenerateTarget:
    """`model.generate`.

    Args:
        model: a causal language model of transformers.
        encode: from a prompt to token ids.
        name: for the heading of a report.
    """

    def __init__(
        self, model: Any, encode: Callable[[str], list[int]], name: str = "transformers' generate"
    ):
        self.name = name
        self._model = model
        self._encode = encode

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Target.ask`."""
        refuse_comings_and_goings(requests, "a batch of generate is fixed")
        prompts = [torch.tensor(self._encode(request.prompt)) for request in requests]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
            for rows in (prompts, [torch.ones_like(prompt) for prompt in prompts])
        )
        with torch.inference_mode():
            out = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=max(request.max_tokens for request in requests),
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        chosen = out.sequences[:, ids.shape[1] :].cpu()
        logprobs = torch.stack([step.float().log_softmax(-1) for step in out.logits], 1).cpu()
        logprobs = logprobs.gather(2, chosen[..., None])[..., 0]
        return [
            _cut(chosen[row], logprobs[row], request.max_tokens, self._ends)
            for row, request in enumerate(requests)
        ]

    @property
    def _ends(self) -> set[int]:
        eos = self._model.generation_config.eos_token_id
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _cut(tokens: torch.Tensor, logprobs: torch.Tensor, most: int, ends: set[int]) -> Answer:
    """A row without the padding that follows its end."""
    ids = tokens.tolist()[:most]
    count = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return Answer(tuple(ids[:count]), tuple(logprobs[:count].tolist()))
