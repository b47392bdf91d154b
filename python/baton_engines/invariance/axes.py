"""The kinds of company in which a prompt is sent again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .target import Request

# Appending a tail makes another prompt with the same beginning.
_TAILS = (" Then,", " However,", " For example,")
_FILLER = "The lamp was lit every evening and put out every morning, and nobody asked why. "


@dataclass(frozen=True)
class Batch:
    """Requests that are sent together.

    Attributes:
        requests: all of them.
        watched: for every request the index of its prompt, or None for a neighbor whose answer is
            not compared.
    """

    requests: tuple[Request, ...]
    watched: tuple[int | None, ...]


@dataclass(frozen=True)
class Axis:
    """One kind of company.

    Attributes:
        name: for a table.
        batches: sent one after another; every prompt is watched exactly once.
    """

    name: str
    batches: tuple[Batch, ...]


def make_axes(
    prompts: Sequence[str], *, max_tokens: int, batch_sizes: Sequence[int], long_words: int
) -> list[Axis]:
    """All axes for these prompts.

    Args:
        prompts: texts, at least one.
        max_tokens: of every answer.
        batch_sizes: each at least 2, at most the number of prompts.
        long_words: words of a long neighbor's prompt.

    Raises:
        ValueError: there is no prompt, or a size or number is out of range.
    """
    if not prompts:
        raise ValueError("make_axes: prompts must not be empty")
    for size in batch_sizes:
        if not 2 <= size <= len(prompts):
            raise ValueError(
                f"make_axes: batch_sizes must be from 2 to {len(prompts)}, the number of prompts, "
                f"got {size}"
            )
    for name, number in (("max_tokens", max_tokens), ("long_words", long_words)):
        if number < 1:
            raise ValueError(f"make_axes: {name} must be >= 1, got {number}")
    asked = [Request(prompt, max_tokens) for prompt in prompts]
    indices = list(range(len(asked)))
    axes = [Axis("alone, again", tuple(_together([index], asked) for index in indices))]
    axes += [
        Axis(
            f"batch of {size}",
            # The last batch is filled up with prompts of the first one as neighbors.
            tuple(_grouped(indices, size, asked)),
        )
        for size in batch_sizes
    ]
    axes.append(Axis("other order", (_together(indices[::-1], asked),)))
    filler = _FILLER * (1 + long_words // len(_FILLER.split()))
    long = " ".join(filler.split()[:long_words])
    axes.append(
        Axis(
            "long neighbor",
            tuple(_with_neighbors(i, asked, [Request(long, max_tokens)]) for i in indices),
        )
    )
    axes.append(Axis("shared beginning", tuple(_after_same_beginnings(asked, max_tokens))))
    late = [Request(prompt, max_tokens, after=min(i, 1) * 2) for i, prompt in enumerate(prompts)]
    axes.append(Axis("arriving late", (_together(indices, late),)))
    axes.append(
        Axis(
            "cancelled neighbors",
            tuple(
                _with_neighbors(
                    i,
                    asked,
                    [
                        Request(long[: 40 * count], max_tokens, cancel_after=count)
                        for count in (1, 2, 3)
                    ],
                )
                for i in indices
            ),
        )
    )
    return axes


def _together(indices: Sequence[int], requests: Sequence[Request]) -> Batch:
    return Batch(tuple(requests[index] for index in indices), tuple(indices))


def _grouped(indices: Sequence[int], size: int, requests: Sequence[Request]) -> Iterator[Batch]:
    for first in range(0, len(indices), size):
        group = list(indices[first : first + size])
        fill = indices[: size - len(group)]
        yield Batch(
            tuple(requests[index] for index in [*group, *fill]), (*group, *[None] * len(fill))
        )


def _with_neighbors(index: int, requests: Sequence[Request], neighbors: Sequence[Request]) -> Batch:
    # Neighbors come first, so that the engine is busy with them when the watched prompt arrives.
    return Batch((*neighbors, requests[index]), (*[None] * len(neighbors), index))


def _after_same_beginnings(requests: Sequence[Request], max_tokens: int) -> Iterator[Batch]:
    for index, request in enumerate(requests):
        same = [Request(request.prompt + tail, max_tokens) for tail in _TAILS]
        # After this the engine may have cached the beginning; it then occurs again within one
        # batch.
        yield Batch((same[0],), (None,))
        yield Batch((*same[1:], request), (None, None, index))
