"""A pool of pages that block tables name, driven at random against a model of plain lists.

As an engine with paged memory uses the ops: a page is a slot to those that copy, and rows share
pages until one of them writes. All columns that no row has are poison, in every step.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from counted import EVENTS, rule
from eight_bit import poison_eight
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition
from numbered_tokens import HEADS, LAYERS, quantized, vectors

import baton_kernels
from baton_kernels.reference._eight_bit import as_they_are
from baton_kernels.testing import assert_same_bits, cumulative, int32

PAGES, PAGE, HEAD_DIM = 12, 4, 16
MAX_PAGES = 5  # of a row
ABSURD = -(2**31)  # what a table holds where its row has no page


# Rows that share all of their pages have equal fields, and are two.
@dataclasses.dataclass(eq=False)
class Row:
    """Tokens in the columns from `start` on: c is column c % PAGE of page `pages[c // PAGE]`."""

    tokens: list[int]
    start: int
    pages: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def pieces(self, first: int = 0) -> Iterator[tuple[int, int, int]]:
        """Page, first column in it and columns, of the tokens from number `first` on."""
        column = self.start + first
        while column < self.end:
            count = min(PAGE - column % PAGE, self.end - column)
            yield self.pages[column // PAGE], column % PAGE, count
            column += count


class PagedMachine(RuleBasedStateMachine):
    """The model: a list of rows, in any order."""

    stored: torch.dtype | None = None  # of eight bits; None for floats

    def __init__(self):
        super().__init__()
        shape = (LAYERS, PAGES, HEADS, PAGE, HEAD_DIM)
        self.caches = [torch.empty(shape, dtype=self.stored or torch.float32) for _ in range(2)]
        self.scales = [torch.empty(shape[:-1]) for _ in range(2)] if self.stored else []
        self.rows: list[Row] = []
        self.parked: list[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]] = []
        self.num_tokens = 0

    # Contents of the pages

    def held(self, tokens):
        """The result of ``extract_kv`` for these tokens."""
        if self.stored is None:
            return vectors(tokens)
        return tuple(as_they_are(*pair) for pair in quantized(tokens, self.stored))

    def scales_of(self, layer=slice(None)):
        """The keyword arguments of the ops with caches of eight bits; none of floats."""
        names = ("key_scale", "value_scale")
        return {name: x[layer] for name, x in zip(names, self.scales, strict=False)}

    def new_tokens(self, count):
        self.num_tokens += count
        return list(range(self.num_tokens - count, self.num_tokens))

    def owners(self):
        """Page -> how many rows have it."""
        return Counter(page for row in self.rows for page in row.pages.values())

    def free_pages(self):
        owners = self.owners()
        return [page for page in range(PAGES) if not owners[page]]

    def reserve(self, row, count):
        """Pages of the row's own for `count` more columns; False where there are too few."""
        end = row.end + count
        indices = range(row.end // PAGE, -(-end // PAGE))
        missing = [index for index in indices if index not in row.pages]
        last = row.pages.get(row.end // PAGE) if count else None
        is_shared = last is not None and self.owners()[last] > 1
        free = self.free_pages()
        if end > MAX_PAGES * PAGE or len(free) < len(missing) + is_shared:
            return False
        if is_shared:
            EVENTS["pages copied because two rows had them"] += 1
            self.move(row, row.end // PAGE, free.pop())
        row.pages.update(zip(missing, free, strict=False))
        return True

    def move(self, row, index, target):
        """Copies the columns that the row has of a page into another page, which it has then."""
        begin = max(row.start, index * PAGE)
        length = min(row.end, (index + 1) * PAGE) - begin
        places = row.pages[index], begin % PAGE, target, begin % PAGE, length
        baton_kernels.move_kv(
            *self.caches, *(int32([place]) for place in places), **self.scales_of()
        )
        row.pages[index] = target

    def write(self, row, first, key, value):
        """All of a row's tokens from number `first` on, in one call."""
        pages, columns, counts = zip(*row.pieces(first), strict=True)
        baton_kernels.insert_kv(
            key, value, *self.caches, cumulative(counts), int32(pages), int32(columns),
            **self.scales_of(),
        )  # fmt: skip

    def read(self, row):
        pages, columns, counts = zip(*row.pieces(), strict=True)
        return baton_kernels.extract_kv(
            *self.caches, cumulative(counts), int32(pages), int32(columns),
            total_tokens=len(row.tokens), **self.scales_of(),
        )  # fmt: skip

    def some_row(self, data):
        return data.draw(st.sampled_from(self.rows))

    # Operations of an engine

    @rule(count=st.integers(1, 11), start=st.integers(0, 2 * PAGE - 1))
    def enter(self, count, start):
        row = Row([], start)
        if self.reserve(row, count):
            row.tokens = self.new_tokens(count)
            self.rows.append(row)
            self.write(row, 0, *vectors(row.tokens))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, 6))
    def prefill_a_chunk(self, data, count):
        row = self.some_row(data)
        if self.reserve(row, count):
            first = len(row.tokens)
            row.tokens += self.new_tokens(count)
            self.write(row, first, *vectors(row.tokens[first:]))

    @rule()
    def append(self):
        """A token for each row that finds a column for it."""
        rows = []
        for row in self.rows:
            if self.reserve(row, 1):
                row.tokens += self.new_tokens(1)
                rows.append(row)
        if not rows:
            return
        key, value = vectors([row.tokens[-1] for row in rows])
        last = [row.end - 1 for row in rows]
        pages = [row.pages[column // PAGE] for row, column in zip(rows, last, strict=True)]
        index = int32(pages), int32([column % PAGE for column in last])
        for layer in range(LAYERS):
            caches = [cache[layer] for cache in self.caches]
            baton_kernels.append_kv(
                key[layer], value[layer], *caches, *index, **self.scales_of(layer)
            )

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data):
        self.rows.remove(self.some_row(data))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def share(self, data):
        """Another row with the same tokens in the same pages, e.g. a second answer."""
        row = self.some_row(data)
        self.rows.append(Row(list(row.tokens), row.start, dict(row.pages)))

    @precondition(lambda self: self.rows and self.free_pages())
    @rule(data=st.data())
    def move_a_page(self, data):
        row = self.some_row(data)
        index = data.draw(st.sampled_from(sorted(row.pages)))
        self.move(row, index, data.draw(st.sampled_from(self.free_pages())))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def slide(self, data):
        """The first tokens leave a window; their pages are given back."""
        row = self.some_row(data)
        count = data.draw(st.integers(0, len(row.tokens) - 1))
        del row.tokens[:count]
        row.start += count
        row.pages = {i: page for i, page in row.pages.items() if i >= row.start // PAGE}

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def preempt(self, data):
        row = self.some_row(data)
        self.parked.append((row.tokens, self.read(row)))
        self.rows.remove(row)

    @precondition(lambda self: self.parked)
    @rule(start=st.integers(0, PAGE - 1))
    def resume(self, start):
        tokens, kept = self.parked[-1]
        row = Row([], start)
        if self.reserve(row, len(tokens)):
            self.parked.pop()
            row.tokens = list(tokens)
            self.rows.append(row)
            self.write(row, 0, *kept)

    def call(self, rows, counts, spoiled=None):
        """Attention of the last tokens of rows through their tables, and its queries."""
        query = torch.cat([vectors(r.tokens[-n:])[0][0] for r, n in zip(rows, counts, strict=True)])
        query = query.repeat_interleave(2, 1)
        table = torch.full((len(rows), MAX_PAGES), ABSURD, dtype=torch.int32)
        for i, row in enumerate(rows):
            for index, page in row.pages.items():
                table[i, index] = page
        if spoiled is not None:
            table[0, next(iter(rows[0].pages))] = spoiled
        layer = LAYERS - 1
        return query, lambda: baton_kernels.ragged_attention(
            query, *(cache[layer] for cache in self.caches), cumulative(counts),
            starts=int32([row.start for row in rows]),
            lengths=int32([len(row.tokens) for row in rows]), block_table=table, return_lse=True,
            **self.scales_of(layer),
        )  # fmt: skip

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def attend(self, data):
        """Each row has the bits of the same row in a separate dense cache."""
        rows = data.draw(st.permutations(self.rows))[: data.draw(st.integers(1, 6))]
        counts = [data.draw(st.integers(1, len(row.tokens))) for row in rows]
        query, call = self.call(rows, counts)
        results = call()
        place = data.draw(st.integers(0, len(rows) - 1))
        mine = slice(sum(counts[:place]), sum(counts[: place + 1]))
        tokens = rows[place].tokens
        dense, scales = [], {}
        if self.stored is None:
            dense = [x[-1].transpose(0, 1)[None] for x in vectors(tokens)]
        else:
            for name, pair in zip(("key", "value"), quantized(tokens, self.stored), strict=True):
                elements, scale = (x[-1].transpose(0, 1)[None].contiguous() for x in pair)
                dense.append(elements)
                scales[f"{name}_scale"] = scale
        index = int32([0]), int32([0]), int32([len(tokens)])
        alone = baton_kernels.ragged_attention(
            query[mine], *dense, cumulative([counts[place]]), *index, return_lse=True, **scales
        )
        for got, want in zip(results, alone, strict=True):
            assert not want.isnan().any()
            assert_same_bits(got[mine], want, f"row {place} in a batch")

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), page=st.sampled_from([-1, PAGES, ABSURD, 2**31 - 1]))
    def attend_through_a_wrong_table(self, data, page):
        row = self.some_row(data)
        with pytest.raises(ValueError, match=r"block_table\[0\]\[\d\] must be .*, got "):
            self.call([row], [1], page)[1]()

    @invariant()
    def rows_hold_their_tokens_and_all_else_is_poisoned(self):
        padding = torch.ones(PAGES, PAGE, dtype=torch.bool)
        for row in self.rows:
            for got, expected in zip(self.read(row), self.held(row.tokens), strict=True):
                assert_same_bits(got, expected, f"tokens {row.tokens}")
            for page, column, count in row.pieces():
                padding[page, column : column + count] = False
        for cache in self.caches:
            if self.stored is None:
                cache.masked_fill_(padding[:, None, :, None], float("nan"))
            else:
                worst = poison_eight(torch.empty(1, dtype=self.stored)).view(torch.int8)
                cache.view(torch.int8).masked_fill_(padding[:, None, :, None], worst[0])
        for scale in self.scales:
            scale.masked_fill_(padding[:, None], float("nan"))


class PagedInt8Machine(PagedMachine):
    stored = torch.int8


class PagedFloat8Machine(PagedMachine):
    stored = torch.float8_e4m3fn


MACHINES = {
    "pages": PagedMachine,
    "pages, int8": PagedInt8Machine,
    "pages, float8": PagedFloat8Machine,
}
