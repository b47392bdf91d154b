"""Applies a query's options to its logits before a token is chosen, for all rows of a step at once.

A query has few tokens compared with the vocabulary, so the rules read and write only the logits of
those tokens: one gather and one scatter per step for any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .sampling_options import SamplingOptions

_NO_IDS = torch.empty(0, dtype=torch.int64, device="cpu")


class LogitRules:
    """The rules of one query, and the tokens it has seen.

    Args:
        options: SamplingOptions.
        prompt: token ids that repetition_penalty counts as seen.
        eos: ids that min_new_tokens excludes at first.

    Attributes:
        options: as given.
        bias: ids and values of logit_bias.
        banned: ids that are never chosen.
    """

    def __init__(self, options: SamplingOptions, prompt: Iterable[int], eos: Iterable[int]):
        self.options = options
        self.bias = (
            _ids(id for id, _ in options.logit_bias),
            torch.tensor([value for _, value in options.logit_bias], device="cpu"),
        )
        self.banned = _ids(options.suppress_tokens)
        self._first = _ids(options.begin_suppress_tokens)
        self._eos = _ids(eos)
        self.counts_tokens = (
            options.repetition_penalty != 1
            or options.frequency_penalty != 0
            or options.presence_penalty != 0
        )
        # For every token seen: its id, and how often the answer has it. Storage grows by doubling.
        self._places: dict[int, int] = {}
        self._seen = _NO_IDS
        self._counts = torch.empty(0, device="cpu")
        self._num_counted = 0
        if options.repetition_penalty != 1:
            self._add(dict.fromkeys(prompt))

    @classmethod
    def of(
        cls, options: SamplingOptions, prompt: Iterable[int], eos: Iterable[int]
    ) -> LogitRules | None:
        """The rules, or None if the options have none."""
        rules = cls(options, prompt, eos)
        has_any = rules.counts_tokens or options.min_new_tokens or options.logit_bias
        return rules if has_any or len(rules.banned) or len(rules._first) else None

    def seen(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the tokens seen, without duplicates, and how often each occurs in the answer.

        Args:
            tokens: the whole answer so far.
        """
        new = tokens[self._num_counted :]
        self._add(new)
        for token in new:
            self._counts[self._places[token]] += 1
        self._num_counted = len(tokens)
        count = len(self._places)
        return self._seen[:count], self._counts[:count]

    def forbidden(self, num_tokens: int) -> torch.Tensor:
        """Ids that the token after `num_tokens` others must not be."""
        parts = [self.banned]
        if num_tokens == 0:
            parts.append(self._first)
        if num_tokens < self.options.min_new_tokens:
            parts.append(self._eos)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if token in self._places:
                continue
            place = len(self._places)
            if place == len(self._seen):
                room = max(64, place)
                self._seen = torch.cat([self._seen, self._seen.new_zeros(room)])
                self._counts = torch.cat([self._counts, self._counts.new_zeros(room)])
            self._places[token] = place
            self._seen[place] = token


def apply_rules(
    rules: Sequence[LogitRules], tokens: Sequence[Sequence[int]], scores: torch.Tensor
) -> None:
    """Change every row's logits by its own rules.

    Args:
        rules: one per row.
        tokens: what each row's query has generated so far.
        scores: float32 [rows, vocab], contiguous. Written.
    """
    flat = scores.view(-1)
    vocab_size = scores.shape[-1]
    where = _flat([rule.bias[0] for rule in rules], vocab_size, flat.device)
    if len(where):
        values = torch.cat([rule.bias[1] for rule in rules]).to(flat.device)
        flat[where] = flat[where] + values
    _apply_penalties(rules, tokens, flat, vocab_size)
    banned = [rule.forbidden(len(own)) for rule, own in zip(rules, tokens, strict=True)]
    where = _flat(banned, vocab_size, flat.device)
    if len(where):
        flat.index_fill_(0, where, -torch.inf)


def _apply_penalties(
    rules: Sequence[LogitRules],
    tokens: Sequence[Sequence[int]],
    flat: torch.Tensor,
    vocab_size: int,
) -> None:
    seen = [
        rule.seen(own) if rule.counts_tokens else (_NO_IDS, _NO_IDS)
        for rule, own in zip(rules, tokens, strict=True)
    ]
    where = _flat([ids for ids, _ in seen], vocab_size, flat.device)
    if not len(where):
        return
    counts = torch.cat([count for _, count in seen]).to(flat.device)
    lengths = torch.tensor([len(ids) for ids, _ in seen], device="cpu")
    factors = torch.tensor(
        [
            (
                rule.options.repetition_penalty,
                rule.options.frequency_penalty,
                rule.options.presence_penalty,
            )
            for rule in rules
        ],
        device="cpu",
    )
    repetition, frequency, presence = (
        factors.repeat_interleave(lengths, dim=0).to(flat.device).unbind(1)
    )
    values = flat[where]
    values = torch.where(values < 0, values * repetition, values / repetition)
    # Product and difference are separate: a fused operation would round differently in some lanes.
    values = values - frequency * counts
    flat[where] = values - presence * (counts > 0)


def _flat(ids: Sequence[torch.Tensor], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Ids of every row as indices into all rows concatenated."""
    lengths = torch.tensor([len(part) for part in ids], device="cpu")
    rows = torch.arange(len(ids), device="cpu").repeat_interleave(lengths)
    return (torch.cat(list(ids)) + rows * vocab_size).to(device)


def _ids(ids: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(dict.fromkeys(ids)), dtype=torch.int64, device="cpu")
