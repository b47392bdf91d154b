"""The outcomes of conditional branches that the calls reach, and why the others are left out."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

from emulation.artifacts import ROOT
from emulation.prove.claims import Coverage

Kernels = Mapping[tuple[str, int], Coverage]  # by kernel and architecture

LONG = "rows of more than 16,384 keys; those of the grids have at most 1,030"
SIZES = "a count that these kernels' launches do not have: every lane and warp begins with work"
UNORDERED = (
    "index values that do not ascend or lie outside of the tensors: the tests of ops have them"
)
BLIND = "vectors that see no key of a row that is split or has several tokens"
HEADS = (
    "more heads than a block's threads take in one round: append_kv's calls have 4, and 2 KV heads"
)
WIDE = "the division in 64 bits, for 2^32 heads and more in all"
SEVERAL = "tiles of several tokens, which Triton's units do not have"
# Part of the file's path, part of the source line, and why one of its outcomes is not reached.
# None of these lines looks at data of CUDA's kernels: what they choose are the calls' numbers.
NAMED: tuple[tuple[str, str, str], ...] = (
    ("common/attention_segments.h", "", LONG),
    ("ragged_attention/prefill.h", "if (first == segment_begin(last + 1))", LONG),
    ("ragged_attention/rows.h", "if (length <= kShortSplits * kSplitKeys)",
     "rows of one token with more than 8,192 keys; those of the grids have at most 600"),
    ("ragged_attention/rows.h", "return length > 0", "segments of no keys, which no kernel counts"),
    ("ragged_attention/rows.h", "(unsigned(first_token) <=", UNORDERED),
    ("ragged_attention/prefill.h", "if (item.splits > 1 && block_keys.begin", BLIND),
    ("ragged_attention/prefill.h", "if (block_keys.begin < block_keys.end)", BLIND),
    ("ragged_attention/merge.h", "if (keys.begin < keys.end)", BLIND),
    ("ragged_attention/merge.h", "first = begin; first < end;", BLIND),
    ("ragged_attention/merge.h", "if (first < end)",
     "rows of more splits than a lane requests at once, 8 or 32"),
    ("ragged_attention/merge.h", "while (index < num_rows", UNORDERED),
    ("ragged_attention/merge.h", "load_4(a.p.cu_seqlens + index + 1)) <= packed", UNORDERED),
    ("ragged_attention/merge.h", "first < head_dim;", SIZES),
    ("ragged_attention/results.h", "if (sums_)",
     "split rows with other head dims than 64: the grids' long rows have 64"),
    ("cuda/append_kv.cu", "for (; count > (kAtOnce - 1) * step;", HEADS),
    ("cuda/append_kv.cu", "if (count <= 0) return;", HEADS),
    ("cuda/append_kv.cu", "if (wide)", "angles of another alignment than the calls' have"),
    ("cuda/append_kv.cu", "if (slot < 0 ||", UNORDERED),
    ("device/copy_tokens.h", "if (query >= a.num_queries)", UNORDERED),
    ("device/find_query.h", "if (__any_sync(~0u, descends))", UNORDERED),
    ("cuda/insert_kv.cu", "if (begin < 0 ||", UNORDERED),
    ("cuda/merge_attention.cu:0", "", WIDE),
    ("cuda/merge_attention.cu", "index / p.num_heads",
     WIDE),
    ("cuda/merge_attention.cu", "for (int32_t chunk = lane;", SIZES),
    ("triton/ragged_attention/pieces.py", "", SEVERAL),
)  # fmt: skip
FOLDERS = "csrc", "baton_kernels"
ELSEWHERE = "reached both ways in other instances of the template"


@dataclasses.dataclass(frozen=True)
class Unreached:
    """An outcome that no call of a kernel has."""

    kernel: str
    architecture: int
    line: str  # path:line, see `shown`
    source: str  # that line
    instruction: str
    never: str  # "taken" or "not taken"


@functools.cache
def lines_of(path: str) -> list[str]:
    for folder in FOLDERS:
        if (ROOT / folder / path).is_file():
            return (ROOT / folder / path).read_text().splitlines()
    return []


def shown(line: str) -> tuple[str, str]:
    """The file, from its folder of sources on, with the line's number; and the line."""
    path, _, number = line.rpartition(":")
    inside = [path.rpartition(f"/{folder}/")[2] for folder in FOLDERS if f"/{folder}/" in path]
    path = inside[0] if inside else path.rpartition("/")[2]
    lines = lines_of(path)
    found = lines[int(number) - 1].strip() if 0 < int(number or 0) <= len(lines) else ""
    return f"{path}:{number}", found


def unreached(kernels: Kernels) -> Iterator[Unreached]:
    for (kernel, architecture), coverage in sorted(kernels.items()):
        for line, instruction, never in coverage.unreached():
            place, source = shown(line)
            yield Unreached(kernel, architecture, place, source, instruction, never)


def lines_reached(kernels: Kernels) -> set[str]:
    """Source lines of which a branch is taken and not taken."""
    return {
        shown(coverage.lines[at])[0]
        for coverage in kernels.values()
        for at, times in coverage.reached.items()
        if all(times)
    }


def reason(outcome: Unreached, both_ways: set[str]) -> str:
    """Why an outcome is left out; empty if there is no known reason."""
    for path, part, text in NAMED:
        if path in outcome.line and part in outcome.source:
            return text
    return ELSEWHERE if outcome.line in both_ways else ""


def summary(kernels: Kernels, every: bool = False) -> tuple[list[str], int]:
    """Lines for print, and the number of outcomes without a reason; every one with `every`."""
    lines = []
    for (kernel, architecture), coverage in sorted(kernels.items()):
        reached, count = coverage.counts
        lines.append(f"{kernel:44} {architecture:>3} {reached:>4} of {count}")
    both_ways = lines_reached(kernels)
    reasons: dict[str, list[Unreached]] = collections.defaultdict(list)
    for outcome in unreached(kernels):
        reasons[reason(outcome, both_ways)].append(outcome)
    lines.append("")
    for text, outcomes in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(outcomes):>4} not reached: {text or 'NO REASON'}")
        if every or not text:
            lines += grouped(outcomes)
    return lines, len(reasons.get("", ()))


def grouped(outcomes: Iterable[Unreached]) -> Iterator[str]:
    """Lines of text, one per source line."""
    by_line: dict[tuple[str, str], list[Unreached]] = collections.defaultdict(list)
    for outcome in outcomes:
        by_line[outcome.line, outcome.source].append(outcome)
    for (line, source), found in sorted(by_line.items()):
        first = found[0]
        kernels = len({(x.kernel, x.architecture) for x in found})
        yield f"        {line}  {source}"
        yield (
            f"            never {first.never} in {first.kernel}, sm_{first.architecture}"
            f" ({kernels} kernels): {first.instruction}"
        )


def markdown(kernels: Kernels) -> list[str]:
    """A table of kernels without their parameters, and one of the reasons."""
    by_kind: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for (kernel, architecture), coverage in kernels.items():
        counts = by_kind[kernel.partition("<")[0], architecture]
        for i, n in enumerate((1, *coverage.counts)):
            counts[i] += n
    lines = [
        "| kernel | PTX of | instances | outcomes reached |",
        "| --- | --- | ---: | ---: |",
    ]
    for (kind, architecture), (instances, reached, count) in sorted(by_kind.items()):
        lines.append(f"| {kind} | sm_{architecture} | {instances} | {reached} of {count} |")
    both_ways = lines_reached(kernels)
    reasons: collections.Counter[str] = collections.Counter(
        reason(outcome, both_ways) or "**no reason known**" for outcome in unreached(kernels)
    )
    lines += ["", "| outcomes not reached | why |", "| ---: | --- |"]
    return lines + [f"| {count} | {text} |" for text, count in reasons.most_common()]
