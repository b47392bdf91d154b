"""Chooses the next token of every row at once: rules on its logits, then arg max or a draw.

A token is a function of its row's logits and of the query's own options, tokens and seed;
neighbors, slots and pauses have no influence. So everything here works either elementwise or row by
row in a fixed order, and a random number belongs to a query and the position of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import baton_kernels as kernels

from .logit_rules import apply_rules
from .query import Query, TokenLogprobs
from .sampler import Sampler
from .sampling_options import SamplingOptions

# The number of candidates considered first for top-p and min-p: sorting a whole vocabulary takes
# milliseconds, and the nucleus is nearly always smaller.
_GUESS = 256
# Tokens per block: block sums are searched first, then the token within the block.
_BLOCK = 64
# Candidates beyond a row's top-k, for tokens that tie with the last one.
_TIES = 32


class Choice(NamedTuple):
    """The result for one row of logits.

    Attributes:
        finite: whether all logits were finite; if not, there is no token.
        token: the next token.
        logprobs: the logarithms that the query requested, or None.
    """

    finite: bool
    token: int = 0
    logprobs: TokenLogprobs | None = None


def choose_next(
    queries: Sequence[Query],
    ready: Sequence[bool],
    logits: torch.Tensor,
    likeliest: Sequence[int] | None = None,
) -> list[Choice]:
    """Chooses the next token of every query that is ready for one.

    Args:
        queries: one per row.
        ready: whether its prompt is complete.
        logits: [rows, vocab], of any floating dtype; rules and draws use their values in float32.
        likeliest: `baton_kernels.likeliest` of every row, if known.
    """
    if not queries:
        return []
    if likeliest is None:
        likeliest = kernels.likeliest(logits).tolist()
    choices = [Choice(token >= 0, max(token, 0)) for token in likeliest]
    rows = [
        row
        for row, query in enumerate(queries)
        if likeliest[row] >= 0 and ready[row] and not query.serving.sampler.takes_likeliest
    ]
    if not rows:
        return choices
    samplers = [queries[row].serving.sampler for row in rows]
    own = _rows_of(logits, rows).float()
    tokens = choose(samplers, [queries[row].tokens for row in rows], own)
    for place, row in enumerate(rows):
        top = samplers[place].options.logprobs
        logprobs = None if top is None else token_logprobs(own[place], tokens[place], top)
        choices[row] = Choice(True, tokens[place], logprobs)
    return choices


def token_logprobs(logits: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    """Logarithms of the probabilities of one token and of the likeliest ones.

    Args:
        logits: float32 [vocab], as the model computed them.
        token: the chosen id.
        top: the number of likeliest tokens.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, min(top, len(logprobs)))
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, logprobs[token].item(), pairs)


def choose(
    samplers: Sequence[Sampler], tokens: Sequence[Sequence[int]], logits: torch.Tensor
) -> list[int]:
    """The next token of every row.

    Args:
        samplers: one per row.
        tokens: what each row's query has generated so far.
        logits: float32 [rows, vocab], finite.
    """
    rules = {row: own for row, sampler in enumerate(samplers) if (own := sampler.rules) is not None}
    if rules:
        ruled = list(rules)
        # The logits stay unchanged, because a callback may look at them.
        scores = logits.clone() if len(ruled) == len(samplers) else logits[ruled]
        apply_rules(list(rules.values()), [tokens[row] for row in ruled], scores)
        if len(ruled) < len(samplers):
            where = torch.tensor(ruled, device=logits.device)
            scores = logits.index_copy(0, where, scores)
        logits = scores
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    chosen = [0] * len(samplers)
    if len(drawn) < len(samplers):
        chosen = logits.argmax(dim=-1).tolist()
    if drawn:
        numbers = [samplers[row].draw(len(tokens[row])) for row in drawn]
        options = [samplers[row].options for row in drawn]
        picked = draw_tokens(_rows_of(logits, drawn), options, numbers)
        for row, token in zip(drawn, picked, strict=True):
            chosen[row] = token
    return chosen


def draw_tokens(
    logits: torch.Tensor, options: Sequence[SamplingOptions], numbers: Sequence[float]
) -> list[int]:
    """Draws one token per row: the one at the number's place in the cumulative probability.

    Args:
        logits: float32 [rows, vocab]; -inf for tokens that must not be drawn.
        options: temperature > 0, top_k, top_p and min_p of each row.
        numbers: in [0, 1), one per row.
    """
    groups: dict[Callable, list[int]] = {}
    for row, option in enumerate(options):
        draw = _draw_free
        if option.top_k:
            # These rows consider few tokens and need no probabilities of the others.
            draw = _draw_largest
        elif option.restricts:
            draw = _draw_nucleus
        groups.setdefault(draw, []).append(row)
    chosen = [0] * len(options)
    for draw, rows in groups.items():
        own = [options[row] for row in rows], [numbers[row] for row in rows]
        for row, token in zip(rows, draw(_rows_of(logits, rows), *own), strict=True):
            chosen[row] = token
    return chosen


def candidates(logits: torch.Tensor, options: SamplingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of one row that may be drawn, likeliest first, and their probabilities.

    Args:
        logits: float32 [vocab].
        options: temperature > 0; then top_k (keep the k largest, and all that equal the smallest of
            them), then top_p (keep a token while the likelier ones sum to less), then min_p (keep a
            token if it is at least this times as likely as the likeliest).

    Returns:
        ids int64 [candidates] and probabilities float64 [candidates], summing to 1.
    """
    logits = logits[None]
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    scores = _scaled(values, values[:, :1], [options])
    weights = scores.exp() if options.top_k else _probabilities(logits, [options]).gather(1, ids)
    mass, kept = _keep(scores, weights, [options])
    count = int(kept[0])
    return ids[0, :count], weights[0, :count].double() / mass[0, count - 1]


def _rows_of(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows; without a copy if they are all rows."""
    return logits if len(rows) == len(logits) else logits[rows]


def _scaled(
    logits: torch.Tensor, largest: torch.Tensor, options: Sequence[SamplingOptions]
) -> torch.Tensor:
    # The largest logit is subtracted first, so that dividing by a small temperature does not
    # overflow at the top.
    temperatures = logits.new_tensor([option.temperature for option in options])
    return (logits - largest).div_(temperatures[:, None])


def _probabilities(logits: torch.Tensor, options: Sequence[SamplingOptions]) -> torch.Tensor:
    """Probabilities of the whole vocabulary. A row's sum does not depend on the number of rows."""
    scores = _scaled(logits, logits.amax(dim=-1, keepdim=True), options)
    return torch.softmax(scores, dim=-1, out=scores)


def _draw_free(
    logits: torch.Tensor, options: Sequence[SamplingOptions], numbers: Sequence[float]
) -> list[int]:
    """Draws from whole vocabularies, in the order of the ids, which needs no sorting."""
    probabilities = _probabilities(logits, options)
    padding = -probabilities.shape[-1] % _BLOCK
    if padding:
        probabilities = torch.nn.functional.pad(probabilities, (0, padding))
    # Finds the block first, then the token in it: there are far fewer block sums to write.
    blocks = probabilities.view(len(options), -1, _BLOCK)
    # Sums in float64: in float32 the tail of a large vocabulary would be lost to rounding.
    mass = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    threshold = _threshold(mass[:, -1:], numbers)
    # The last token found has a probability above 0, because the threshold is below the total.
    found = torch.searchsorted(mass, threshold, right=True).clamp_(max=mass.shape[-1] - 1)
    before = torch.where(found > 0, mass.gather(1, (found - 1).clamp_(min=0)), 0.0)
    block = blocks.gather(1, found[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1)
    within = block.cumsum(dim=-1, dtype=torch.float64)
    # A block's sum and its cumulative sums round differently: keep to tokens that may be drawn.
    most = torch.nextafter(within[:, -1:], torch.zeros_like(before))
    rest = torch.minimum(threshold - before, most)
    places = torch.searchsorted(within, rest, right=True)
    return (found * _BLOCK + places).squeeze(1).tolist()


def _draw_largest(
    logits: torch.Tensor, options: Sequence[SamplingOptions], numbers: Sequence[float]
) -> list[int]:
    """Draws from rows with top_k; probabilities are relative to their candidates."""
    size = max(option.top_k for option in options) + _TIES
    return _draw_sorted(logits, options, numbers, size, None)


def _draw_nucleus(
    logits: torch.Tensor, options: Sequence[SamplingOptions], numbers: Sequence[float]
) -> list[int]:
    """Draws from rows with top_p or min_p; probabilities are relative to the whole vocabulary."""
    return _draw_sorted(logits, options, numbers, _GUESS, _probabilities(logits, options))


def _draw_sorted(
    logits: torch.Tensor,
    options: Sequence[SamplingOptions],
    numbers: Sequence[float],
    size: int,
    probabilities: torch.Tensor | None,
) -> list[int]:
    """Draws from the candidates in the order of `candidates`: likeliest first, then lower ids.

    Args:
        size: how many of the largest logits are considered first.
        probabilities: of the whole vocabulary; None for those relative to the candidates.
    """
    vocab_size = logits.shape[-1]
    tokens = [0] * len(options)
    rows = list(range(len(options)))
    while rows:
        size = min(size, vocab_size)
        own = [options[row] for row in rows]
        values, ids = _largest(_rows_of(logits, rows), size)
        values = _scaled(values, values[:, :1], own)
        if probabilities is None:
            weights = values.exp()
        else:
            weights = _rows_of(probabilities, rows).gather(1, ids)
        mass, kept = _keep(values, weights, own)
        last = kept[:, None] - 1
        threshold = _threshold(mass.gather(1, last), [numbers[row] for row in rows])
        places = torch.minimum(torch.searchsorted(mass, threshold, right=True), last)
        found = ids.gather(1, places).squeeze(1).tolist()
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
        if size == vocab_size:
            break
        # If the last candidate ties with the last one considered, there may be more ties, and which
        # of them were found is arbitrary. Such rows are searched further.
        at_edge = (values.gather(1, last) <= values[:, -1:]).squeeze(1).tolist()
        rows = [row for row, is_at_edge in zip(rows, at_edge, strict=True) if is_at_edge]
        size *= 16
    return tokens


def _largest(logits: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits of every row and their ids; among equal logits lower ids come first."""
    values, ids = torch.topk(logits, size, dim=-1)
    tied = torch.nonzero((values[:, 1:] == values[:, :-1]).any(dim=-1)).squeeze(1)
    if len(tied):
        in_order = ids[tied].sort(dim=-1).values
        own, order = logits[tied].gather(1, in_order).sort(dim=-1, descending=True, stable=True)
        values[tied], ids[tied] = own, in_order.gather(1, order)
    return values, ids


def _keep(
    values: torch.Tensor, probabilities: torch.Tensor, options: Sequence[SamplingOptions]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative float64 probabilities of sorted candidates, and how many each row keeps."""
    size = values.shape[-1]
    device = values.device
    mass = probabilities.cumsum(dim=-1, dtype=torch.float64)
    ones = torch.ones_like(mass[:, :1])
    # top_k keeps the first candidates of the row.
    limits = torch.tensor(
        [min(option.top_k, size) if option.top_k else size for option in options], device=device
    )
    kept = (values >= values.gather(1, limits[:, None] - 1)).sum(dim=-1)
    top_k = torch.tensor([bool(option.top_k) for option in options], device=device)[:, None]
    # Without top_k the whole vocabulary counts, whose probabilities sum to 1.
    total = torch.where(top_k, mass.gather(1, kept[:, None] - 1), ones)
    top_p = mass.new_tensor([option.top_p for option in options])[:, None]
    # A token stays if those before it sum to less than top_p; the first one always stays.
    before = torch.cat([torch.zeros_like(ones), mass[:, :-1]], dim=-1)
    stays = (before < top_p * total) | (top_p >= 1)
    min_p = mass.new_tensor([option.min_p for option in options])[:, None]
    stays &= probabilities.double() >= min_p * probabilities[:, :1].double()
    stays[:, 0] = True
    # Both rules keep the first candidates, too.
    return mass, torch.minimum(kept, stays.long().cumprod(dim=-1).sum(dim=-1))


def _threshold(total: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """number * total for every row [rows, 1]."""
    share = total.new_tensor(numbers)[:, None]
    # Rounding could raise the product to the total, past every candidate.
    return torch.minimum(total * share, torch.nextafter(total, torch.zeros_like(total)))
