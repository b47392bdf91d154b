"""Paged caches that hold the rows of a dense problem, with poison everywhere else."""

import dataclasses

import torch

from baton_kernels.testing import AttentionProblem, embed, poison_

# How the pages lie in memory; each is passed as [pages, num_kv_heads, page, head_dim].
LAYOUTS = ("heads first", "columns first", "keys and values together")
# Values that are not pages, for table entries that must not be read.
ABSURD = (-(2**31), 2**31 - 1)


@dataclasses.dataclass
class PagedProblem:
    """The tensor arguments of ``ragged_attention`` with a block table; `arguments` by name."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        return dict(vars(self))


def paged_problem(
    dense: AttentionProblem,
    page: int,
    *,
    layout: str = "heads first",
    ascending: bool = False,
    spare_pages: int = 3,
    seed: int = 0,
    margins: tuple[int, ...] | None = None,
) -> PagedProblem:
    """The same rows, their columns in pages of this size.

    Columns without a row, pages without an owner and entries without a column are poisoned.
    ``ascending``: pages of a row follow each other in memory; otherwise their places are random.
    """
    generator = torch.Generator().manual_seed(seed)
    _, num_kv_heads, _, head_dim = dense.key_cache.shape
    places = list(
        zip(dense.slots.tolist(), dense.starts.tolist(), dense.lengths.tolist(), strict=True)
    )
    # For each row with columns: where its first page begins, and how many pages it has.
    owned = {
        row: (start // page * page, (start + length - 1) // page - start // page + 1)
        for row, (_, start, length) in enumerate(places)
        if length
    }
    num_pages = sum(count for _, count in owned.values()) + spare_pages
    order = torch.randperm(num_pages, generator=generator)
    if ascending:
        order = torch.arange(spare_pages, num_pages)
    max_pages = max((first // page + count for first, count in owned.values()), default=1) + 1
    # A slice of a larger table, as an engine has it.
    table = torch.empty(len(places) + 1, max_pages + 3, dtype=torch.int32)
    table[:, 0::2], table[:, 1::2] = ABSURD
    block_table = table[1:, 1:-2]
    caches = [
        poison_(dense.key_cache.new_empty(num_pages, num_kv_heads, page, head_dim))
        for _ in range(2)
    ]
    taken = 0
    for row, (first, count) in owned.items():
        slot, start, length = places[row]
        at = order[taken : taken + count]
        block_table[row, first // page : first // page + count] = at
        for cache, source in zip(caches, (dense.key_cache, dense.value_cache), strict=True):
            columns = poison_(cache.new_empty(num_kv_heads, count * page, head_dim))
            columns[:, start - first : start - first + length] = source[
                slot, :, start : start + length
            ]
            cache[at.to(cache.device)] = columns.unflatten(1, (count, page)).transpose(0, 1)
        taken += count
    device = dense.query.device
    key_cache, value_cache = lay_out(*caches, layout, margins)
    return PagedProblem(
        dense.query, key_cache, value_cache, dense.cu_seqlens_q, dense.starts, dense.lengths,
        block_table.to(device),
    )  # fmt: skip


def lay_out(keys, values, layout, margins=None):
    """The pages as views of larger memory."""
    if layout == "heads first":
        return embed(keys, margins), embed(values, margins)
    if layout == "columns first":
        return tuple(embed(x.transpose(1, 2), margins).transpose(1, 2) for x in (keys, values))
    # For each page and head all keys, then all values: vLLM's cache on the CPU.
    return embed(torch.cat((keys, values), 2), margins).chunk(2, 2)
