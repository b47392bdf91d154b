"""Decode attention through block tables: compared with the same rows in slots, and for rows that
share their first pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from baton_kernels import ragged_attention

from .attention_cases import LLAMA, SMOLLM2, decode_lengths, limit, ours
from .attention_work import AttentionWork, Heads
from .measure import OURS, Row, Way, Work
from .options import Options
from .report import dtype_name

MHA = Heads(12, 12, 64)
# Columns of a page, and whether the heads of a column are adjacent, as in a pool of tokens;
# otherwise the columns of each head of a page are adjacent. A page of 2048 contains a whole row, so
# it shows the cost of the layout without that of the table.
PAGES = ((128, False), (16, False), (1, False), (2048, True), (16, True), (1, True))


def name_of(page: int, heads_last: bool) -> str:
    return f"pages of {page}{', heads last' if heads_last else ''}"


class Pages:
    """A work's rows in pages in random order, surrounded by NaN; all rows begin with `shared`
    pages."""

    def __init__(self, work: AttentionWork, page: int, heads_last: bool, shared: int = 0):
        self.work = work
        counts = [-(-length // page) - shared for length in work.lengths]
        order = torch.randperm(
            sum(counts) + shared, generator=torch.Generator().manual_seed(0)
        ).int()
        self.table = torch.full((len(counts), max(counts) + shared), -1, dtype=torch.int32)
        self.table[:, :shared] = order[:shared]
        for row, pages in enumerate(order[shared:].split(counts)):
            self.table[row, shared : shared + len(pages)] = pages
        heads = work.heads
        shape = (work.layers, 2, len(order), heads.kv, page, heads.dim)
        if heads_last:
            shape = (*shape[:3], page, heads.kv, heads.dim)
        self.caches = torch.full(shape, float("nan"), dtype=work.dtype, device=work.device)
        if heads_last:
            self.caches = self.caches.transpose(3, 4)
        self.table = self.table.to(work.device)
        for row, length in enumerate(work.lengths):
            column = torch.arange(length, device=work.device)
            place = self.table[row, column // page].long(), slice(None), column % page
            for layer in range(work.layers):
                for cache, rows in zip(self.caches[layer], work.row(layer, row), strict=True):
                    cache[place] = rows.transpose(0, 1)

    def calls(self) -> list[Callable[[], object]]:
        """Calls as those of `AttentionWork.calls`."""
        work = self.work
        return [
            functools.partial(
                ragged_attention, work.query, *caches, work.cu_seqlens, None, *work.index[1:],
                max_query_length=max(work.query_lengths), max_length=max(work.lengths),
                block_table=self.table,
            )
            for caches in self.caches
        ]  # fmt: skip


def paged(options: Options) -> Iterator[Work]:
    """One decoded token per row, with its keys and values in scattered pages or in a slot."""
    lengths = decode_lengths(32, 128, 2048, 686)
    if options.tiny:
        lengths = [1, 5, 16]
    for dtype in options.dtypes:
        for heads in (LLAMA, SMOLLM2):
            label = f"{len(lengths)} rows of {min(lengths)}..{max(lengths)}, {heads}"
            if options.only not in label:
                continue
            work = AttentionWork(
                heads, [1] * len(lengths), lengths, dtype=dtype, device=options.device
            )
            ways = [ours(work, "slots")]
            for page, heads_last in PAGES:
                pages = Pages(work, page, heads_last)
                ways.append(Way(name_of(page, heads_last), pages.calls(), work.check, OURS))
            ways += options.peers(lambda w=work: options.vllm.ways(w, options.effort))
            yield Work(
                label, dtype_name(dtype), [*ways, *limit(options, work.bytes)],
                bytes=work.bytes, ceiling="read",
            )  # fmt: skip


def prefix(options: Options) -> Iterator[Work]:
    """One decoded token of rows with a common prefix; bytes count each column in memory once."""
    rows, page, common, own = (3, 16, 1024, 40) if options.tiny else (32, 128, 4096, 256)
    if options.device.name != "cpu":
        return
    for dtype in options.dtypes:
        for heads in (SMOLLM2, MHA):
            label = f"{rows} rows, {common} shared + {own} own, {heads}"
            if options.only not in label:
                continue
            work = AttentionWork(
                heads, [1] * rows, [common + own] * rows, dtype=dtype, device=options.device
            )
            for tensor in (work.cache.keys, work.cache.values):
                tensor[:, 1:, :, :common] = tensor[:, :1, :, :common]
            ways = [
                Way("prefix shared", Pages(work, page, False, common // page).calls(), work.check,
                    OURS),
                Way("copies of it", Pages(work, page, False).calls(), work.check, OURS),
            ]  # fmt: skip
            num_bytes = work.bytes * (common + rows * own) // (rows * (common + own))
            yield Work(
                label, dtype_name(dtype),
                [*ways, *limit(options, num_bytes)], bytes=num_bytes, ceiling="read",
            )  # fmt: skip


def prefix_summary(rows: list[Row]) -> list[str]:
    """Compared with reading every byte once, and with reading it for every row."""
    return [
        f"{row.dtype}, {row.work}: {row.way} / prefix shared = {row.ratio:.2f}"
        for row in rows
        if row.way != "prefix shared" and row.ratio
    ]


def paged_summary(rows: list[Row]) -> list[str]:
    """The cost of a block table."""
    return [
        f"{row.dtype}, {row.work}: {row.way} / slots = {row.ratio:.2f}"
        for row in rows
        if row.kind == OURS and row.way != "slots" and row.ratio
    ]
