"""Calls of ragged_attention whose tensors are leaves, and what each query token's result is."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import torch

from baton_kernels.testing import cumulative, int32
from emulation.cuda.ops import PREFILL_KERNELS
from emulation.prove.claims import NOBODY
from emulation.ptx.symbolic_ops import SymbolicOps
from emulation.ptx.terms import CONCRETE, PLUS_ZERO, Terms


@dataclasses.dataclass(frozen=True)
class Row:
    """A query whose last ``queries`` of ``length`` tokens are in this call; leaves bear its tag.

    With a block table it has no slot. A row whose start is negative has no place: it is not
    read, and its results are not written.
    """

    tag: str
    length: int
    queries: int
    slot: int = 0
    start: int = 0


# Numbers of pages that do not exist, for entries of a block table that must not be used. Kernels
# replace them by the last page, which belongs to no row here.
ABSURD = (-(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: rows, the cache that they lie in, and what is the same for all of them."""

    rows: tuple[Row, ...]
    num_slots: int = 1
    capacity: int = 0  # 0: what the rows need
    page: int = 0  # columns of a page of a cache with a block table; 0: a cache of slots
    order: int = 0  # seed of the order that the rows' pages have in memory
    transposed: bool = False  # the cache is a view of [slots, capacity, heads, dim]
    padded: bool = False  # unused elements follow each row of the tensors
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    causal: bool = True
    return_lse: bool = True
    finite: bool = False  # values of the cache are neither NaN nor infinite
    exact_bounds: bool = True  # the host is told the longest row, not the capacity
    idle_tokens: int = 0  # query tokens of no row, behind all others
    prefill: str = "mma"  # the kernel for rows of several tokens, as BATON_PREFILL names it

    def sees(self, row: Row, position: int) -> range:
        """Keys that a token sees; one before the row's first token sees none."""
        if position < 0:
            return range(0)
        end = position + 1 if self.causal else row.length
        return range(0 if self.window is None else max(0, position + 1 - self.window), end)

    def __str__(self) -> str:
        rows = ", ".join(
            f"{row.tag}: {row.queries} of {row.length} tokens in slot {row.slot} at {row.start}"
            for row in self.rows
        )
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "rows" and getattr(self, field.name) != field.default
        ]
        return "; ".join([rows, *changed])


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """A leaf that reaches a row's result, or is read by anybody, and must not."""

    tag: str
    where: str
    leaf: str


@dataclasses.dataclass
class Outcome:
    """``results[tag, position, head]``: terms of a query vector's output, and of its lse if any."""

    results: dict[tuple[str, int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    influences: list[Forbidden]
    reads: list[Forbidden]


def leaves(ops: SymbolicOps, x: torch.Tensor, tensor: str, name_of) -> None:
    """Gives every element of a tensor a leaf; ``name_of(*index)`` has its name and class.

    Memory between the elements in the same storage gets leaves of the class "outside".
    """
    halves = ops.shadow.of(x)
    size = x.element_size() // 2
    halves[:] = CONCRETE
    at = x.storage_offset()
    for index in itertools.product(*map(range, x.shape)):
        first = (at + sum(i * s for i, s in zip(index, x.stride(), strict=True))) * size
        name, of_class = name_of(*index)
        for half in range(size):
            part = () if size == 1 else (f"half {half}",)
            halves[first + half] = ops.table.leaf((*name, *part), of_class)
    outside(ops, halves, tensor)


def vector_leaves(ops: SymbolicOps, x: torch.Tensor, tensor: str, name_of) -> None:
    """The same without the last index in ``name_of``: padding has one leaf for all dims."""
    halves = ops.shadow.of(x)
    size, count = x.element_size() // 2, x.shape[-1]
    halves[:] = CONCRETE
    leaf = ops.table.leaf
    parts = [()] if size == 1 else [(f"half {half}",) for half in range(size)]
    for index in itertools.product(*map(range, x.shape[:-1])):
        first = x.storage_offset() + sum(i * s for i, s in zip(index, x.stride()[:-1], strict=True))
        name, of_class = name_of(*index)
        if of_class == "padding":
            terms = leaf(name, of_class)
        else:
            terms = [leaf((*name, dim, *part), of_class) for dim in range(count) for part in parts]
        halves[first * size : (first + count) * size] = terms
    outside(ops, halves, tensor)


def outside(ops: SymbolicOps, halves: np.ndarray, tensor: str) -> None:
    """Gives leaves of the class "outside" to memory that belongs to no element."""
    for i in np.flatnonzero(halves == CONCRETE):
        halves[i] = ops.table.leaf((f"{tensor}'s storage, byte {2 * i}",), "outside")


def block_table(call: Call) -> tuple[list[list[int]], int]:
    """The pages of each row, then at least one entry without columns, and the number of pages.

    The last page belongs to no row.
    """
    counts = [-(-(row.start + row.length) // call.page) for row in call.rows]
    order = list(range(sum(counts)))
    random.Random(call.order).shuffle(order)
    table = []
    for number, count in enumerate(counts):
        absurd = [ABSURD[(number + i) % 2] for i in range(max(counts) + 1 - count)]
        table.append([order.pop() for _ in range(count)] + absurd)
    return table, sum(counts) + 1


def tensors(call: Call, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; all are zero, since the numbers are not used."""
    num_heads, num_kv_heads = call.heads
    capacity = call.page or call.capacity or max(row.start + row.length for row in call.rows)
    # Unused elements, a multiple of sixteen bytes, keep the rows aligned.
    width = call.head_dim + (16 if call.padded else 0)
    shape = (num_slots, num_kv_heads, capacity, width)
    if call.transposed:
        shape = (shape[0], shape[2], shape[1], shape[3])
    caches = [torch.zeros(shape, dtype=call.dtype)[..., : call.head_dim] for _ in range(2)]
    if call.transposed:
        caches = [cache.transpose(1, 2) for cache in caches]
    total = sum(row.queries for row in call.rows) + call.idle_tokens
    query = torch.zeros(total, num_heads, width, dtype=call.dtype)[..., : call.head_dim]
    return query, *caches


def ends_with_zero(table: Terms, term: int) -> bool:
    """Whether an element's last operation but rounding adds +0: no sign of a zero survives that.

    Rounding may be one instruction or many that look at bits.
    """
    seen, waiting = {term}, [term]
    while waiting:
        kind, *arguments = table.nodes[waiting.pop()]
        if kind == "fma.rn.f32":
            if table.value(arguments[2]) != (PLUS_ZERO, 32):
                return False
        elif kind == "leaf" or ".f32" in kind and not kind.startswith(("cvt.", "setp.")):
            return False
        elif kind not in ("constant", "concrete"):
            waiting += set(arguments) - seen
            seen.update(arguments)
    return True


def run(ops: SymbolicOps, call: Call) -> Outcome:
    """Executes a call on terms, and looks at what each result is made of."""
    num_heads, num_kv_heads = call.heads
    group = num_heads // num_kv_heads
    table = ops.table
    ops.forget()
    ops.prefill = PREFILL_KERNELS.index(call.prefill)
    table_of_rows, num_slots = block_table(call) if call.page else ([], call.num_slots)
    query, key, value = tensors(call, num_slots)
    tokens = [
        (row, row.length - row.queries + token) for row in call.rows for token in range(row.queries)
    ]

    def place(number: int, row: Row, position: int) -> tuple[int, int]:
        """Slot or page, and column there."""
        column = row.start + position
        if not call.page:
            return row.slot, column
        return table_of_rows[number][column // call.page], column % call.page

    owner = {
        place(number, row, position): (row, position)
        for number, row in enumerate(call.rows)
        for position in range(row.length if row.start >= 0 else 0)
    }

    def name_query(token: int, head: int):
        if token >= len(tokens) or tokens[token][0].start < 0:
            return ("query of no row",), "padding"
        row, position = tokens[token]
        return ("query", row.tag, position, head), ("query", row.tag, position, head // group)

    def name_cache(tensor: str):
        def name(slot: int, head: int, column: int):
            if (slot, column) not in owner:
                return (f"{tensor}'s padding", slot, head, column), "padding"
            row, position = owner[slot, column]
            return (tensor, row.tag, position, head), (tensor, row.tag, position, head)

        return name

    vector_leaves(ops, query, "query", name_query)
    vector_leaves(ops, key, "key", name_cache("key"))
    vector_leaves(ops, value, "value", name_cache("value"))
    if call.finite:
        kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[call.dtype]
        halves = ops.shadow.of(value)
        halves[:] = [table.halves.finite_or_zero(int(x), kind) for x in halves]
    options = {}
    for name, given in (("alibi_slopes", call.alibi), ("sinks", call.sinks)):
        if given:
            options[name] = torch.zeros(num_heads)
            leaves(ops, options[name], name, lambda head, name=name: ((name, head), (name, head)))
    rows = call.rows
    with ops.entered():
        result = ops.ragged_attention(
            query, key, value, cumulative([row.queries for row in rows]),
            None if call.page else int32([row.slot for row in rows]),
            int32([row.start for row in rows]), int32([row.length for row in rows]),
            causal=call.causal, window=call.window, softcap=call.softcap,
            return_lse=call.return_lse,
            max_query_length=max(row.queries for row in rows) if call.exact_bounds else None,
            max_length=max(row.length for row in rows) if call.exact_bounds else None,
            block_table=torch.tensor(table_of_rows, dtype=torch.int32) if call.page else None,
            **options,
        )  # fmt: skip
    out, lse = result if call.return_lse else (result, None)
    out_terms = ops.terms_of(out)
    lse_terms = None if lse is None else ops.terms_of(lse)
    outcome = Outcome({}, [], [])
    everything = (1 << len(table.classes)) - 1
    for (token, (row, position)), head in itertools.product(enumerate(tokens), range(num_heads)):
        if row.start < 0:
            continue
        kv_head = head // group
        seen = call.sees(row, position)
        # Classes that may be in the result, and those that have to be.
        needed = [("query", row.tag, position, kv_head)]
        needed += [(name, row.tag, j, kv_head) for name in ("key", "value") for j in seen]
        allowed = [*needed, *((name, h) for name in options for h in range(num_heads))]
        terms = tuple(out_terms[token, head].reshape(-1).tolist())
        if table.drops_zeros and not all(ends_with_zero(table, term) for term in terms):
            text = table.text(next(term for term in terms if not ends_with_zero(table, term)))
            raise AssertionError(
                f"the sign of a zero in a sum of values may reach {row.tag}'s {position}: {text}"
            )
        log = () if lse_terms is None else tuple(lse_terms[token, head].tolist())
        # A machine that loses terms would prove anything: what a token sees has to be there.
        for of_class in needed if seen else ():
            bit = table.class_bits([of_class])
            for result in (terms[0], *(log[-1:] if of_class[0] != "value" else ())):
                if not table.reach[result] & bit:
                    raise AssertionError(f"{row.tag}'s {position} without {of_class}")
        outcome.results[row.tag, position, head] = terms, log
        forbidden = everything & ~table.class_bits(allowed)
        for term in terms + log:
            if table.reach[term] & forbidden:
                leaf = table.leaves(term, forbidden)[0]
                where = f"the result of {row.tag}'s token {position}, head {head}"
                outcome.influences.append(Forbidden(row.tag, where, table.text_of(leaf)))
                break
    seen_by_row = {
        (name, row.tag, j, head)
        for row, position in tokens
        if row.start >= 0
        for name, j, head in itertools.product(
            ("key", "value"), call.sees(row, position), range(num_kv_heads)
        )
    }
    for term in ops.shadow.reads - {0}:
        node = table.nodes[term]
        if node[0] != "leaf":
            continue
        of_class = table.class_of(term)
        hidden = of_class[0] in ("key", "value") and of_class not in seen_by_row
        if of_class in NOBODY or hidden:
            outcome.reads.append(Forbidden("", "a load", table.text_of(node[1])))
    return outcome
