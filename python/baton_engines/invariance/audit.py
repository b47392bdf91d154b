"""Sends prompts and compares every answer with the first one to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .axes import Axis
from .target import Answer, Request, Target, TargetError, UnsupportedError


@dataclass(frozen=True)
class Finding:
    """One answer compared with the answer to the same prompt by itself.

    Attributes:
        prompt: index of the prompt.
        first_difference: index of the first token that differs; None: all tokens are equal.
        largest_gap: largest absolute difference of log-probabilities over the equal tokens before
            that; None if the engine gives no log-probabilities, or if there is no such token.
        equal: whether tokens and log-probabilities are equal, the latter in all the digits given.
    """

    prompt: int
    first_difference: int | None
    largest_gap: float | None
    equal: bool


@dataclass(frozen=True)
class AxisResult:
    """The result for one axis.

    Attributes:
        name: of the axis.
        findings: one per prompt, in the order of the prompts; empty if `unsupported`.
        unsupported: why the engine cannot be tested on this axis, or None.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    unsupported: str | None = None

    @property
    def equal(self) -> int:
        """The number of answers that are equal."""
        return sum(finding.equal for finding in self.findings)

    @property
    def first_difference(self) -> int | None:
        """The earliest token that differs in any answer."""
        places = [f.first_difference for f in self.findings if f.first_difference is not None]
        return min(places, default=None)

    @property
    def largest_gap(self) -> float | None:
        """The largest difference of log-probabilities in any answer."""
        return max(
            (f.largest_gap for f in self.findings if f.largest_gap is not None), default=None
        )


def audit(
    target: Target,
    prompts: Sequence[str],
    axes: Sequence[Axis],
    *,
    max_tokens: int,
    on_axis: Callable[[str], None] = lambda name: None,
) -> Iterator[AxisResult]:
    """Yields the result of each axis as soon as it is known.

    Args:
        target: the engine.
        prompts: the ones that the axes were made for.
        axes: see `make_axes`.
        max_tokens: of every answer, as in the axes.
        on_axis: called with the name of each axis before it is tested.

    Raises:
        TargetError: a prompt got no answer, or an empty one, which shows nothing.
    """
    on_axis("alone")
    references = []
    for prompt in prompts:
        (answer,) = target.ask([Request(prompt, max_tokens)])
        if not answer.tokens:
            raise TargetError(f"{target.name}: no token in the answer to {prompt[:60]!r}")
        references.append(answer)
    for axis in axes:
        on_axis(axis.name)
        try:
            findings = _findings(target, axis, references)
        except UnsupportedError as error:
            yield AxisResult(axis.name, unsupported=str(error))
        else:
            yield AxisResult(axis.name, tuple(sorted(findings, key=lambda f: f.prompt)))


def _findings(target: Target, axis: Axis, references: Sequence[Answer]) -> list[Finding]:
    findings = []
    for batch in axis.batches:
        answers = target.ask(batch.requests)
        for prompt, answer in zip(batch.watched, answers, strict=True):
            if prompt is not None:
                findings.append(compare(prompt, references[prompt], answer))
    return findings


def compare(prompt: int, reference: Answer, answer: Answer) -> Finding:
    """The finding for a prompt, given the answer to it by itself and the one in company."""
    count = 0
    for before, now in zip(reference.tokens, answer.tokens, strict=False):
        if before != now:
            break
        count += 1
    same = count == len(reference.tokens) == len(answer.tokens)
    gaps = [
        abs(before - now)
        for before, now in zip(reference.logprobs[:count], answer.logprobs[:count], strict=False)
    ]
    return Finding(
        prompt=prompt,
        first_difference=None if same else count,
        largest_gap=max(gaps, default=None),
        equal=same and reference.logprobs == answer.logprobs,
    )
