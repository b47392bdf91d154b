"""insert_kv, extract_kv, move_kv and append_kv on terms: what is written is a leaf, or is rotated.

A copy's statements are one: every element of the target has the term of the element that belongs
there, and every other keeps its own. Influence of anything else, or of the batch, would be another
term.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from baton_kernels.testing import cumulative, int32
from emulation.prove.attention import leaves
from emulation.prove.claims import BATCH, COPY, HIDDEN, OUTSIDE, Prover, look_at_reads

# dtype, head_dim and unused elements behind a head: chunks of 16, 4 and 2 bytes.
WIDTHS = [
    (torch.bfloat16, 64, 0), (torch.bfloat16, 16, 2), (torch.bfloat16, 16, 1),
    (torch.float32, 16, 0),
]  # fmt: skip
Widths = Sequence[tuple[torch.dtype, int, int]]
HEADS = 2


class Tensors:
    """Caches and packed tokens whose elements are leaves, with and without layers."""

    def __init__(self, prover: Prover, width: tuple[torch.dtype, int, int], layers: int) -> None:
        self.prover, self.ops = prover, prover.ops
        self.dtype, self.head_dim, self.behind = width
        self.leading = (layers,) if layers else ()
        self.ops.forget()

    def leaf(
        self, name: str, shape: Sequence[int], used: Callable = lambda *_: True, more: int = 0
    ):
        """A tensor, and the terms of its elements; those that are not used are padding.

        ``more`` unused elements follow a head, in addition to those of all tensors.
        """
        width = self.head_dim + self.behind + more
        x = torch.zeros(*self.leading, *shape, width, dtype=self.dtype)[..., : self.head_dim]

        def named(*index: int):
            inside = index[len(self.leading) : -1]
            return (name, *index), name if used(*inside) else "padding"

        leaves(self.ops, x, name, named)
        return x, self.ops.terms_of(x).copy()

    def compare(self, claim, x: torch.Tensor, expected: np.ndarray, what: str) -> None:
        terms = self.ops.terms_of(x)
        evidence = ""
        if not np.array_equal(terms, expected):
            place = tuple(int(i) for i in np.argwhere(terms != expected)[0])
            text = self.prover.terms.text
            evidence = f"{what}{place[:-1]} is {text(terms[place])}, not {text(expected[place])}"
        claim.check(not evidence, evidence)


@dataclasses.dataclass(frozen=True)
class Queries:
    """Arguments of insert_kv and extract_kv; a query whose slot is -1 has no place."""

    lengths: Sequence[int]
    starts: Sequence[int]
    slots: Sequence[int]

    @classmethod
    def of(cls, lengths: Sequence[int], starts: Sequence[int], lost: Sequence[int] = ()) -> Queries:
        """Slots are given from the last one down."""
        rows = range(len(lengths))
        return cls(lengths, starts, [-1 if i in lost else rows[-1 - i] for i in rows])

    @property
    def capacity(self) -> int:
        return max(map(sum, zip(self.lengths, self.starts, strict=True))) + 2

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """First token, length, slot and start of those that have a place."""
        first = 0
        for length, slot, start in zip(self.lengths, self.slots, self.starts, strict=True):
            if slot >= 0:
                yield first, length, slot, start
            first += length

    def __str__(self) -> str:
        counts = collections.Counter(self.lengths)
        text = ", ".join(
            f"{n} x {length}" if n > 1 else str(length) for length, n in counts.items()
        )
        return f"lengths {text}; {self.slots.count(-1)} without a place"


def prove_insert(prover: Prover, queries: Queries, widths: Widths = WIDTHS) -> None:
    rows = len(queries.lengths)
    grid = f"{queries}; 0 and 2 layers, {len(widths)} kinds of chunks"
    copy, outside = (prover.claim("insert_kv", s, grid) for s in (COPY, OUTSIDE))
    for width, layers, zero in itertools.product(widths, (0, 2), (False, True)):
        t = Tensors(prover, width, layers)
        packed = [t.leaf(name, (sum(queries.lengths), HEADS)) for name in ("key", "value")]
        # Strides of values are those of keys, or are not.
        caches = [
            t.leaf(name, (rows, HEADS, queries.capacity), lambda *_: False, more)
            for name, more in (("key_cache", 0), ("value_cache", 16 * zero))
        ]
        with t.ops.entered():
            t.ops.insert_kv(
                packed[0][0], packed[1][0], caches[0][0], caches[1][0],
                cumulative(queries.lengths), int32(queries.slots), int32(queries.starts),
                zero_padding=zero,
            )  # fmt: skip
        for (_, tokens), (cache, expected) in zip(packed, caches, strict=True):
            for first, length, slot, start in queries.places():
                part = np.moveaxis(tokens[..., first : first + length, :, :, :], -4, -3)
                expected[..., slot, :, start : start + length, :, :] = part
                if zero:
                    expected[..., slot, :, :start, :, :] = 0
            t.compare(copy, cache, expected, "cache")
        look_at_reads(prover, outside)
    prover.keep_coverage()


def prove_extract(prover: Prover, queries: Queries, widths: Widths = WIDTHS) -> None:
    rows, total = len(queries.lengths), sum(queries.lengths)
    grid = f"{queries}; 0 and 2 layers, {len(widths)} kinds of chunks"
    copy, outside = (prover.claim("extract_kv", s, grid) for s in (COPY, OUTSIDE))
    of_slot = {slot: range(start, start + n) for _, n, slot, start in queries.places()}

    def used(slot: int, head: int, column: int) -> bool:
        return column in of_slot.get(slot, ())

    for width, layers, more in itertools.product(widths, (0, 2), (0, 16)):
        t = Tensors(prover, width, layers)
        caches = [
            t.leaf("key_cache", (rows, HEADS, queries.capacity), used),
            t.leaf("value_cache", (rows, HEADS, queries.capacity), used, more),
        ]
        out = [t.leaf(name, (total, HEADS)) for name in ("key", "value")]
        with t.ops.entered():
            t.ops.extract_kv(
                caches[0][0], caches[1][0], cumulative(queries.lengths), int32(queries.slots),
                int32(queries.starts), total_tokens=total, out=(out[0][0], out[1][0]),
            )  # fmt: skip
        for (x, expected), (_, terms) in zip(out, caches, strict=True):
            # Tokens without a place keep what they were.
            for first, length, slot, start in queries.places():
                part = np.moveaxis(terms[..., slot, :, start : start + length, :, :], -4, -3)
                expected[..., first : first + length, :, :, :] = part
            t.compare(copy, x, expected, "token")
        look_at_reads(prover, outside)
    prover.keep_coverage()


def prove_move(
    prover: Prover, moves: Sequence[tuple[int, int, int, int, int]], widths: Widths = WIDTHS
) -> None:
    """Moves: source slot and start, target slot and start, length; negative ones do nothing."""
    grid = f"{len(moves)} moves, 0 and 2 layers, {len(widths)} kinds of chunks"
    copy, outside = (prover.claim("move_kv", s, grid) for s in (COPY, OUTSIDE))
    num_slots = 1 + max(slot for move in moves for slot in (move[0], move[2]))
    done = [move for move in moves if min(move) >= 0 and move[4] > 0]
    capacity = max(max(move[1], move[3]) + move[4] for move in moves) + 1

    def used(slot: int, head: int, column: int) -> bool:
        return any(slot == m[0] and m[1] <= column < m[1] + m[4] for m in done)

    for width, layers in itertools.product(widths, (0, 2)):
        t = Tensors(prover, width, layers)
        caches = [
            t.leaf(name, (num_slots, HEADS, capacity), used)
            for name in ("key_cache", "value_cache")
        ]
        with t.ops.entered():
            t.ops.move_kv(
                caches[0][0], caches[1][0], *(int32(column) for column in zip(*moves, strict=True))
            )
        for cache, terms in caches:
            expected = terms.copy()
            for source, first, target, to, length in done:
                expected[..., target, :, to : to + length, :, :] = terms[
                    ..., source, :, first : first + length, :, :
                ]
            t.compare(copy, cache, expected, "cache")
        look_at_reads(prover, outside)
    prover.keep_coverage()


def append(prover: Prover, tags: str, width, angles: torch.dtype | None, half: int):
    """Terms of row A's key, value and rotated query, and classes that they may not reach."""
    ops, rows, (dtype, head_dim, behind) = prover.ops, len(tags), width
    ops.forget()

    def named(tensor: str):
        return lambda row, *index: ((tensor, tags[row], *index), ("token", tags[row]))

    def tensor(name: str, *shape: int, of=dtype) -> torch.Tensor:
        x = torch.zeros(rows, *shape[:-1], shape[-1] + behind, dtype=of)[..., : shape[-1]]
        leaves(ops, x, name, named(name))
        return x

    key, value = (tensor(name, HEADS, head_dim) for name in ("key", "value"))
    caches = []
    for name in ("key_cache", "value_cache"):
        cache = torch.zeros(rows, HEADS, 4, head_dim + behind, dtype=dtype)[..., :head_dim]
        caches.append(cache)
        leaves(ops, caches[-1], name, lambda *index, name=name: ((name, *index), "padding"))
    query = cos = sin = None
    if angles:
        query = tensor("query", 2 * HEADS, head_dim)
        cos, sin = (tensor(name, half, of=angles) for name in ("cos", "sin"))
    slots = list(reversed(range(rows)))
    with ops.entered():
        rotated = ops.append_kv(
            key, value, *caches, int32(slots), int32([row % 3 for row in range(rows)]),
            query=query, cos=cos, sin=sin,
        )  # fmt: skip
    row = tags.index("A")
    written = [ops.terms_of(cache)[slots[row], :, row % 3] for cache in caches]
    if rotated is not None:
        written.append(ops.terms_of(rotated)[row])
    unchanged = all(
        prover.terms.nodes[term][0] == "leaf" and prover.terms.class_of(term) == "padding"
        for i, cache in enumerate(caches)
        for other, column in itertools.product(range(rows), range(4))
        if (other, column) not in {(slots[r], r % 3) for r in range(rows)}
        for term in ops.terms_of(cache)[other, :, column].reshape(-1).tolist()
    )
    return np.concatenate([x.reshape(-1) for x in written]), unchanged


def prove_append(prover: Prover, companies: Sequence[str], widths: Widths = WIDTHS) -> None:
    """Row A in several companies; plain, and with rotary of whole and of half a head's angles."""
    # Angles are in float32 or in the key's dtype.
    for angles in dict.fromkeys((None, torch.float32, *(width[0] for width in widths))):
        what = "plain" if angles is None else f"rotary, {str(angles).removeprefix('torch.')} angles"
        grid = f"{what}; {len(companies)} companies"
        hidden, outside, batch = (
            prover.claim("append_kv", s, grid) for s in (HIDDEN, OUTSIDE, BATCH)
        )
        for width in widths:
            if angles not in (None, torch.float32, width[0]):
                continue
            for half in (width[1] // 2, width[1]) if angles else (0,):
                alone = None
                for tags in companies:
                    terms, unchanged = append(prover, tags, width, angles, half)
                    allowed = prover.terms.class_bits([("token", "A")])
                    strange = [t for t in terms.tolist() if prover.terms.reach[t] & ~allowed]
                    hidden.check(
                        unchanged and not strange, prover.influence(strange, allowed, tags)
                    )
                    look_at_reads(prover, outside)
                    if alone is not None:
                        batch.check(np.array_equal(alone, terms), f"rows {tags}: another term")
                    alone = terms if alone is None else alone
    prover.keep_coverage()


def prove_merge(prover: Prover, companies: Sequence[str], widths: Widths = WIDTHS) -> None:
    """merge_attention of token A in several companies: only leaves of the same head."""
    table, ops = prover.terms, prover.ops
    hidden, outside, batch = (
        prover.claim(
            "merge_attention", s, f"{len(companies)} companies; {len(widths)} kinds of chunks"
        )
        for s in (HIDDEN, OUTSIDE, BATCH)
    )
    for dtype, head_dim, behind in widths:
        alone = None
        for tags in companies:
            ops.forget()
            given = {}
            for side in "ab":
                shape = (len(tags), HEADS, head_dim + behind)
                given[f"out_{side}"] = torch.zeros(shape, dtype=dtype)[..., :head_dim]
                given[f"lse_{side}"] = torch.zeros(len(tags), HEADS)
            for name, x in given.items():
                leaves(
                    ops, x, name,
                    lambda token, head, *dim, name=name, tags=tags: (
                        (name, tags[token], head, *dim), ("token", tags[token], head)
                    ),
                )  # fmt: skip
            with ops.entered():
                out, lse = ops.merge_attention(**given)
            row = tags.index("A")
            parts = []
            for head in range(HEADS):
                terms = [*ops.terms_of(out)[row, head].reshape(-1), *ops.terms_of(lse)[row, head]]
                allowed = table.class_bits([("token", "A", head)])
                strange = [t for t in terms if table.reach[t] & ~allowed]
                hidden.check(not strange, prover.influence(strange, allowed, tags))
                parts += terms
            look_at_reads(prover, outside)
            if alone is not None:
                batch.check(alone == parts, f"tokens {tags}: another term")
            alone = alone or parts
    prover.keep_coverage()
