"""The emulated CUDA kernels behind the signatures of ``baton_kernels``, on CPU tensors.

What a binding does on the device is done here in Python: the shared argument checks, the Params,
the outputs filled with poison. A report of the emulator becomes an ``EmulationError``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from baton_kernels.ops import append_kv as append_kv_op
from baton_kernels.ops import extract_kv as extract_kv_op
from baton_kernels.ops import insert_kv as insert_kv_op
from baton_kernels.ops import merge_attention as merge_attention_op
from baton_kernels.ops import move_kv as move_kv_op
from baton_kernels.ops import ragged_attention as ragged_attention_op
from emulation import build

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORWARD, BACKWARD, SHUFFLED = 0, 1, 2
# PrefillKernel in csrc/common/ragged_attention.h.
PREFILL_KERNELS = ("automatic", "mma", "mma32", "wgmma")


class EmulationError(RuntimeError):
    """A defect of a kernel that the emulator or its judge found."""


@functools.cache
def module(variant: build.Variant) -> ModuleType:
    """The kernels of a variant, compiled when first used."""
    return build.build_module(variant)


def strides(x: torch.Tensor, dims: int) -> list[int]:
    """Strides of the last ``dims`` dimensions but one; a missing leading dimension has stride 0."""
    values = list(x.stride()[:-1])
    return [0] * (dims - len(values)) + values


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def sizes(cache: torch.Tensor) -> list[int]:
    return [1] * (5 - cache.dim()) + list(cache.shape)


def output(like: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Not zeros: a kernel that forgets an element must be seen."""
    return torch.full(shape, float("nan"), dtype=like.dtype)


class EmulatedOps:
    """One backend of the ``ops`` fixture."""

    def __init__(
        self, variant: build.Variant = build.FAST, *,
        threads=FORWARD, warps=FORWARD, blocks=FORWARD, late_copies=False, seed=1,
        prefill: str = "automatic",
    ) -> None:  # fmt: skip
        """Order of threads, warps and blocks, and whether cp.async and products of warpgroups
        happen as late as allowed; which kernel takes rows of several tokens, "automatic" or
        as BATON_PREFILL names it."""
        self.variant = variant
        self.judged = variant is build.JUDGED
        self.schedule = (threads, warps, blocks, late_copies, seed)
        self.prefill = PREFILL_KERNELS.index(prefill)
        self.captured: list[Callable[[], None]] | None = None
        self.parts: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def module(self) -> ModuleType:
        return module(self.variant)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While it lasts, kernels run in this backend's order."""
        self.module.set_options(*self.schedule)
        yield

    def traffic(self) -> tuple[dict, dict]:
        """Loads and stores by tensor since the last call (judged builds count them)."""
        return self.module.take_counters()

    @contextlib.contextmanager
    def only(self, **parts: dict[str, torch.Tensor]) -> Iterator[None]:
        """Lets kernels touch only the given parts of these tensors.

        `traffic()` counts each part separately. A part's columns lie side by side: all memory from
        its first to its last element belongs to it.
        """
        self.parts = parts
        try:
            yield
        finally:
            self.parts = {}

    def capture(self, function: Callable[[], object]) -> tuple[object, Callable[[], None]]:
        """Captures the calls of a function, as a CUDA graph does.

        Returns:
            What the function gave, not yet written, and the graph: every call of it runs the
            captured launches on what the same tensors hold then.
        """
        self.captured = []
        try:
            result = function()
            launches = list(self.captured)
        finally:
            self.captured = None

        def replay() -> None:
            for launch in launches:
                launch()

        return result, replay

    def run(self, op: str, inputs: dict, outputs: dict, **fields) -> None:
        """Calls a kernel: tensors by the name of their pointer in Params, other fields by name."""
        params = getattr(self.module, op)()
        tensors = inputs | outputs
        for name, x in tensors.items():
            setattr(params, name, pointer(x))
        for name, value in fields.items():
            setattr(params, name, value)
        if self.captured is None:
            self.judge(op, params.run, tensors, outputs)
            return
        error, graph = params.capture()
        if error:
            raise EmulationError(f"{op}: CUDA error {error}")
        # Holds the tensors, whose addresses are in the graph.
        self.captured.append(lambda: self.judge(op, graph.run, tensors, outputs))

    def judge(self, op: str, run: Callable[[], tuple], tensors: dict, outputs: dict) -> None:
        """Runs launches; the tensors are what they may touch."""
        for name, whole in tensors.items() if self.judged else ():
            for part, x in self.parts.get(name, {name: whole}).items():
                if x is not None and x.numel():
                    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                    self.module.add_region(
                        part, x.data_ptr(), (last + 1) * x.element_size(), name in outputs
                    )
        try:
            error, reports = run()
        finally:
            self.module.clear_regions()
        if error or reports:
            raise EmulationError("\n".join([f"{op}: CUDA error {error}", *reports]))

    def given(
        self, rows: int, cu_seqlens: torch.Tensor | None, slots: torch.Tensor | None,
        starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Index arguments, those left out made by the kernel that the binding calls for it."""
        if cu_seqlens is None or slots is None or starts is None:
            values = torch.full((2 * rows + 1,), -1, dtype=torch.int32)
            self.run("fill_indices", {}, {"values": values}, num_rows=rows)
            cu_seqlens = values[: rows + 1] if cu_seqlens is None else cu_seqlens
            slots = values[:rows] if slots is None else slots
            starts = values[rows + 1 :] if starts is None else starts
        return cu_seqlens, slots, starts

    def insert_kv(
        self, key, value, key_cache, value_cache, cu_seqlens=None, slots=None, starts=None, *,
        zero_padding=False,
    ):  # fmt: skip
        rows = check(insert_kv_op)(
            key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding=zero_padding
        )
        cu_seqlens, slots, starts = self.given(rows, cu_seqlens, slots, starts)
        self.run(
            "insert_kv",
            {"key": key, "value": value,
             "cu_seqlens": cu_seqlens, "slots": slots, "starts": starts},
            {"key_cache": key_cache, "value_cache": value_cache},
            num_queries=len(slots), total_tokens=key.shape[-3], sizes=sizes(key_cache),
            key_strides=strides(key, 3), value_strides=strides(value, 3),
            key_cache_strides=strides(key_cache, 4), value_cache_strides=strides(value_cache, 4),
            dtype=DTYPES[key.dtype], zero_padding=zero_padding,
        )  # fmt: skip

    def extract_kv(
        self, key_cache, value_cache, cu_seqlens=None, slots=None, starts=None, *, total_tokens,
        out=None,
    ):  # fmt: skip
        rows = check(extract_kv_op)(
            key_cache, value_cache, cu_seqlens, slots, starts, total_tokens=total_tokens
        )
        cu_seqlens, slots, starts = self.given(rows, cu_seqlens, slots, starts)
        *layers, _, num_kv_heads, _, head_dim = key_cache.shape
        shape = [*layers, total_tokens, num_kv_heads, head_dim]
        key, value = out or (output(key_cache, shape), output(key_cache, shape))
        self.run(
            "extract_kv",
            {"key_cache": key_cache, "value_cache": value_cache, "cu_seqlens": cu_seqlens,
             "slots": slots, "starts": starts},
            {"key": key, "value": value},
            num_queries=len(slots), total_tokens=total_tokens, sizes=sizes(key_cache),
            key_strides=strides(key, 3), value_strides=strides(value, 3),
            key_cache_strides=strides(key_cache, 4), value_cache_strides=strides(value_cache, 4),
            dtype=DTYPES[key.dtype],
        )  # fmt: skip
        return key, value

    def append_kv(
        self, key, value, key_cache, value_cache, slots=None, columns=None, *, query=None,
        cos=None, sin=None,
    ):  # fmt: skip
        check(append_kv_op)(
            key, value, key_cache, value_cache, slots, columns, query=query, cos=cos, sin=sin
        )
        _, slots, _ = self.given(len(key), columns, slots, columns)
        rotated = None if query is None else output(query, list(query.shape))
        self.run(
            "append_kv",
            {"key": key, "value": value, "query": query, "slots": slots, "columns": columns,
             "cos": cos, "sin": sin},
            {"key_cache": key_cache, "value_cache": value_cache, "rotated_query": rotated},
            num_rows=len(key), num_heads=0 if query is None else query.shape[1],
            rotary_dim=0 if cos is None else cos.shape[1],
            cos_row_stride=0 if cos is None else cos.stride(0),
            sin_row_stride=0 if sin is None else sin.stride(0),
            sizes=sizes(key_cache), key_strides=strides(key, 3), value_strides=strides(value, 3),
            query_strides=[0, 0, 0] if query is None else strides(query, 3),
            key_cache_strides=strides(key_cache, 4), value_cache_strides=strides(value_cache, 4),
            dtype=DTYPES[key.dtype], rotary_dtype=DTYPES[key.dtype if cos is None else cos.dtype],
        )  # fmt: skip
        return rotated

    def move_kv(
        self, key_cache, value_cache, source_slots=None, source_starts=None, target_slots=None,
        target_starts=None, lengths=None,
    ):  # fmt: skip
        check(move_kv_op)(
            key_cache,
            value_cache,
            source_slots,
            source_starts,
            target_slots,
            target_starts,
            lengths,
        )
        rows = len(lengths)
        _, source_slots, source_starts = self.given(rows, lengths, source_slots, source_starts)
        _, target_slots, target_starts = self.given(rows, lengths, target_slots, target_starts)
        indices = {
            "source_slots": source_slots, "source_starts": source_starts,
            "target_slots": target_slots, "target_starts": target_starts, "lengths": lengths,
        }  # fmt: skip
        self.run(
            "move_kv", indices, {"key_cache": key_cache, "value_cache": value_cache},
            num_moves=len(lengths), sizes=sizes(key_cache), dtype=DTYPES[key_cache.dtype],
            key_cache_strides=strides(key_cache, 4), value_cache_strides=strides(value_cache, 4),
        )  # fmt: skip

    def merge_attention(self, out_a, lse_a, out_b, lse_b):
        check(merge_attention_op)(out_a, lse_a, out_b, lse_b)
        num_queries, num_heads, head_dim = out_a.shape
        out = output(out_a, [num_queries, num_heads, head_dim])
        lse = output(lse_a, [num_queries, num_heads])
        self.run(
            "merge_attention",
            {"out_a": out_a, "out_b": out_b, "lse_a": lse_a, "lse_b": lse_b},
            {"out": out, "lse": lse},
            num_queries=num_queries, num_heads=num_heads, head_dim=head_dim,
            out_a_strides=strides(out_a, 3), out_b_strides=strides(out_b, 3),
            dtype=DTYPES[out_a.dtype],
        )  # fmt: skip
        return out, lse

    def ragged_attention(
        self, query, key_cache, value_cache, cu_seqlens_q=None, slots=None, starts=None,
        lengths=None, *, scale=None, causal=True, window=None, softcap=0.0, alibi_slopes=None,
        sinks=None, return_lse=False, out=None, max_query_length=None, max_length=None,
        block_table=None,
    ):  # fmt: skip
        check(ragged_attention_op)(
            query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths, scale=scale,
            causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            max_query_length=max_query_length, max_length=max_length, block_table=block_table,
        )  # fmt: skip
        total_queries, num_heads, head_dim = query.shape
        capacity = key_cache.shape[2]
        rows, paged = len(lengths), {}
        cu_seqlens_q, slots, starts = self.given(
            rows, cu_seqlens_q, lengths if block_table is not None else slots, starts
        )
        if block_table is not None:
            slots, max_pages = None, block_table.shape[1]
            capacity *= max_pages
            paged = dict(block_table_stride=block_table.stride(0), max_pages=max_pages)
            if block_table.numel() == 0:
                # torch gives it no memory, and null stands for no table.
                block_table = torch.zeros(1, dtype=torch.int32)
        if out is None:
            out = output(query, [total_queries, num_heads, head_dim])
            lse = output(torch.empty(0), [total_queries, num_heads]) if return_lse else None
        else:
            out, lse = out if return_lse else (out, None)
        fields = dict(
            num_rows=rows, num_heads=num_heads, sizes=sizes(key_cache), **paged,
            query_strides=strides(query, 3), key_cache_strides=strides(key_cache, 4),
            value_cache_strides=strides(value_cache, 4),
            scale=head_dim**-0.5 if scale is None else scale, softcap=softcap, window=window or 0,
            causal=causal, dtype=DTYPES[query.dtype], total_queries=total_queries,
            max_query_length=total_queries if max_query_length is None else max_query_length,
            max_length=capacity if max_length is None else max_length,
            prefill=self.prefill,
        )  # fmt: skip
        plan = self.module.ragged_attention()
        for name, value in {**fields, "block_table": pointer(block_table)}.items():
            setattr(plan, name, value)
        workspace = output(torch.empty(0), [plan.workspace_floats()])
        self.run(
            "ragged_attention",
            {"query": query, "key_cache": key_cache, "value_cache": value_cache,
             "cu_seqlens": cu_seqlens_q, "slots": slots, "starts": starts, "lengths": lengths,
             "alibi_slopes": alibi_slopes, "sinks": sinks, "block_table": block_table},
            {"out": out, "lse": lse, "workspace": workspace},
            **fields,
        )  # fmt: skip
        return (out, lse) if return_lse else out


def check(function):
    """The checks of an op, which its module keeps next to it."""
    import sys

    return sys.modules[function.__module__].check_arguments
