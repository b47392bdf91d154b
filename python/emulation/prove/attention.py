"""Calls of ragged_attention whose tensors are leaves, and what each query token's result is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from baton_kernels.testing import cumulative, int32
from emulation.prove.claims import NOBODY
from emulation.ptx.symbolic_ops import SymbolicOps
from emulation.ptx.terms import CONCRETE, PLUS_ZERO, Terms


@dataclasses.dataclass(frozen=True)
class Row:
    """A query whose last ``queries`` of ``length`` tokens are in this call; leaves bear its tag."""

    tag: str
    length: int
    queries: int
    slot: int = 0
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: rows, the cache that they lie in, and what is the same for all of them."""

    rows: tuple[Row, ...]
    num_slots: int = 1
    capacity: int = 0  # 0: what the rows need
    transposed: bool = False  # the cache is a view of [slots, capacity, heads, dim]
    padded: bool = False  # rows of the tensors have elements of nobody behind them
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

    def sees(self, row: Row, position: int) -> range:
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
    """``results[tag, position, head]``: terms of a query vector's output, then of its lse."""

    results: dict[tuple[str, int, int], tuple[int, ...]]
    influences: list[Forbidden]
    reads: list[Forbidden]


def leaves(ops: SymbolicOps, x: torch.Tensor, tensor: str, name_of) -> None:
    """Gives every element of a tensor a leaf; ``name_of(*index)`` has its name and class.

    What lies between the elements in the same storage is nobody's.
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
    for i in np.flatnonzero(halves == CONCRETE):
        halves[i] = ops.table.leaf((f"{tensor}'s storage, byte {2 * i}",), "outside")


def tensors(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; zeros, since nobody looks at the numbers."""
    num_heads, num_kv_heads = call.heads
    capacity = call.capacity or max(row.start + row.length for row in call.rows)
    # Sixteen bytes of nobody keep the rows aligned.
    width = call.head_dim + (16 if call.padded else 0)
    shape = (call.num_slots, num_kv_heads, capacity, width)
    if call.transposed:
        shape = (shape[0], shape[2], shape[1], shape[3])
    caches = [torch.zeros(shape, dtype=call.dtype)[..., : call.head_dim] for _ in range(2)]
    if call.transposed:
        caches = [cache.transpose(1, 2) for cache in caches]
    total = sum(row.queries for row in call.rows)
    query = torch.zeros(total, num_heads, width, dtype=call.dtype)[..., : call.head_dim]
    return query, *caches


def ends_with_zero(table: Terms, term: int) -> bool:
    """Whether an element's last operation but rounding adds +0: no sign of a zero survives that."""
    kind, *arguments = table.nodes[term]
    if kind == "ite":
        return all(ends_with_zero(table, x) for x in arguments[1:])
    if kind in ("lo", "hi") or kind.startswith("cvt.rn."):
        return ends_with_zero(table, arguments[0])
    return kind == "constant" or (
        kind == "fma.rn.f32" and table.value(arguments[2]) == (PLUS_ZERO, 32)
    )


def run(ops: SymbolicOps, call: Call) -> Outcome:
    """Executes a call on terms, and looks at what each result is made of."""
    num_heads, num_kv_heads = call.heads
    group = num_heads // num_kv_heads
    table = ops.table
    ops.forget()
    query, key, value = tensors(call)
    tokens = [
        (row, row.length - row.queries + token) for row in call.rows for token in range(row.queries)
    ]
    owner = {
        (row.slot, row.start + position): (row, position)
        for row in call.rows
        for position in range(row.length)
    }

    def name_query(token: int, head: int, dim: int):
        row, position = tokens[token]
        return ("query", row.tag, position, head, dim), ("query", row.tag, position, head // group)

    def name_cache(tensor: str):
        def name(slot: int, head: int, column: int, dim: int):
            if (slot, column) not in owner:
                return (f"{tensor}'s padding", slot, head, column, dim), "padding"
            row, position = owner[slot, column]
            return (tensor, row.tag, position, head, dim), (tensor, row.tag, position, head)

        return name

    leaves(ops, query, "query", name_query)
    leaves(ops, key, "key", name_cache("key"))
    leaves(ops, value, "value", name_cache("value"))
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
        out, lse = ops.ragged_attention(
            query, key, value, cumulative([row.queries for row in rows]),
            int32([row.slot for row in rows]), int32([row.start for row in rows]),
            int32([row.length for row in rows]), causal=call.causal, window=call.window,
            softcap=call.softcap, return_lse=True,
            max_query_length=max(row.queries for row in rows) if call.exact_bounds else None,
            max_length=max(row.length for row in rows) if call.exact_bounds else None, **options,
        )  # fmt: skip
    out_terms, lse_terms = ops.terms_of(out), ops.terms_of(lse)
    outcome = Outcome({}, [], [])
    everything = (1 << len(table.classes)) - 1
    for (token, (row, position)), head in itertools.product(enumerate(tokens), range(num_heads)):
        kv_head = head // group
        seen = call.sees(row, position)
        allowed = [("query", row.tag, position, kv_head)]
        allowed += [(name, row.tag, j, kv_head) for name in ("key", "value") for j in seen]
        allowed += [(name, h) for name in options for h in range(num_heads)]
        forbidden = everything & ~table.class_bits(allowed)
        terms = (*out_terms[token, head].reshape(-1), *lse_terms[token, head])
        outcome.results[row.tag, position, head] = tuple(int(term) for term in terms)
        # A machine that loses terms would prove anything: what a token sees has to be there.
        needed = [table.class_bits([of_class]) for of_class in allowed]
        if not all(ends_with_zero(table, int(term)) for term in terms[: -lse_terms.shape[-1]]):
            raise AssertionError("the sign of a zero in a sum of values may reach the result")
        for name, result in (("out", terms[0]), ("lse", terms[-1])):
            for of_class, bit in zip(allowed, needed, strict=True):
                used = name == "out" or of_class[0] in ("query", "key")
                if used and len(of_class) == 4 and not table.reach[result] & bit:
                    raise AssertionError(f"{name} of {row.tag}'s {position} without {of_class}")
        for term in outcome.results[row.tag, position, head]:
            if table.reach[term] & forbidden:
                leaf = table.leaves(term, forbidden)[0]
                where = f"the result of {row.tag}'s token {position}, head {head}"
                outcome.influences.append(Forbidden(row.tag, where, table.text_of(leaf)))
                break
    seen_by_row = {
        (name, row.tag, j, head)
        for row, position in tokens
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
