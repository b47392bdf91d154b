"""Insertion, extraction, relocation and appending of keys and values, compared with memcpy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from baton_kernels import KVCache, append_kv, extract_kv, insert_kv, move_kv, ragged_attention
from baton_kernels.testing import assert_same_bits, cumulative, int32

from .attention_cases import LLAMA, SMOLLM2, decode_lengths
from .attention_work import AttentionWork
from .measure import LIMIT, OURS, PEER, Row, Way, Work
from .options import Options
from .report import dtype_name

LAYERS, SLOT = 30, 3
# The content of every column that the op must not write.
UNTOUCHED = 7.0


class CopyWork:
    """Packed keys and values of one query for every layer, and a cache with room for them."""

    def __init__(self, options: Options, dtype: torch.dtype):
        heads, self.tiny = LLAMA, options.tiny
        rows, self.capacity, self.tokens = (4, 32, 8) if options.tiny else (32, 2048, 512)
        # Bytes of one layer.
        self.bytes = 2 * self.tokens * heads.kv * heads.dim * dtype.itemsize
        # At least a model's layers, and four times the last cache level between two visits of a
        # layer.
        self.model_layers = options.pick(LAYERS, None, 2)
        cold = -(-4 * options.device.cache_bytes // self.bytes) + 1
        self.layers = max(self.model_layers, cold)
        device = options.device.name
        self.cache = KVCache(
            self.layers, rows, heads.kv, self.capacity, heads.dim, dtype=dtype, device=device
        )
        generator = torch.Generator().manual_seed(0)
        shape = (self.layers, self.tokens, heads.kv, heads.dim)
        self.key, self.value = (
            torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(2)
        )
        self.start = self.capacity // 4
        self.cu_seqlens = cumulative([self.tokens], device)
        self.slot, self.column = int32([SLOT], device), int32([self.start], device)
        self.reset()

    def reset(self) -> None:
        for tensor in (self.cache.keys, self.cache.values):
            tensor[:, SLOT].fill_(UNTOUCHED)

    def place(self) -> None:
        """Puts the query into every layer, as insertion would."""
        self.reset()
        for layer in range(self.layers):
            self.columns(layer, self.start)[0].copy_(self.key[layer].transpose(0, 1))
            self.columns(layer, self.start)[1].copy_(self.value[layer].transpose(0, 1))

    def columns(self, layer: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache.layer(layer)
        return (
            keys[SLOT, :, start : start + self.tokens],
            values[SLOT, :, start : start + self.tokens],
        )

    def check_at(self, start: int, others: bool = True, layer: int = 0) -> Callable[[object], None]:
        """Checks that a layer holds the query from column `start`, and nothing else changed."""

        def check(_: object) -> None:
            got = self.columns(layer, start)
            whole = self.cache.layer(layer)
            for actual, packed, cache in zip(got, (self.key, self.value), whole, strict=True):
                assert_same_bits(actual, packed[layer].transpose(0, 1), "inserted columns")
                if others:
                    around = [cache[SLOT, :, :start], cache[SLOT, :, start + self.tokens :]]
                    assert all((x == UNTOUCHED).all() for x in around), "other columns were written"

        return check

    def check_packed(self, result: object, layer: int = 0) -> None:
        """Checks the tokens that were extracted from a layer."""
        for got, packed in zip(result, (self.key, self.value), strict=True):
            assert_same_bits(got, packed[layer], "extracted tokens")

    @property
    def half(self) -> int:
        """The layer at which peers begin, so that no way finds in cache what another has just
        read."""
        return self.layers // 2

    def per_layer(self, call: Callable[[int], object], first: int = 0) -> list[Callable]:
        """Calls for every layer in turn, from layer `first` on."""
        layers = range(self.layers)
        return [functools.partial(call, layer) for layer in (*layers[first:], *layers[:first])]


def insert(options: Options) -> Iterator[Work]:
    """One prefilled query enters a running batch: compared with memcpy and the usual ways."""
    for dtype in options.dtypes:
        work = CopyWork(options, dtype)
        index = (work.cu_seqlens, work.slot, work.column)

        def one(layer: int, work=work, index=index) -> None:
            insert_kv(work.key[layer], work.value[layer], *work.cache.layer(layer), *index)

        check = work.check_at(work.start)
        ours = Way("insert_kv", work.per_layer(one), check, OURS, work.reset)
        name = dtype_name(dtype)
        label = f"{work.tokens} tokens into {work.cache.shape.num_slots} x {work.capacity}"
        yield Work(
            f"{label}, one layer", name,
            [ours, *options.peers(lambda w=work: insert_peers(w)), *memcpy(options, work.bytes)],
            bytes=work.bytes, ceiling="memcpy",
        )  # fmt: skip
        model = work.model_layers
        everything = functools.partial(
            insert_kv, work.key[:model], work.value[:model], work.cache.keys[:model],
            work.cache.values[:model], *index,
        )  # fmt: skip
        ours = Way("insert_kv, one call", [everything], check, OURS, work.reset)
        total = model * work.bytes
        yield Work(
            f"{label}, {model} layers", name, [ours, *memcpy(options, total)],
            bytes=total, ceiling="memcpy",
        )  # fmt: skip


def memcpy(options: Options, num_bytes: int) -> list[Way]:
    calls = options.device.copiers(num_bytes)
    return [Way(f"{options.device.copier} of the same bytes", calls, kind=LIMIT)] if calls else []


def insert_peers(work: CopyWork) -> list[Way]:
    """torch: one row in place; a whole batch copied into place; padded and concatenated."""

    def in_place(layer: int) -> None:
        for target, packed in zip(
            work.columns(layer, work.start), (work.key, work.value), strict=True
        ):
            target.copy_(packed[layer].transpose(0, 1))

    # The cost of a batch without free slots: its rows move to a larger cache, or a new one is
    # created. Two layers, each many times as large as the processor's caches.
    old = [tuple(x.clone() for x in work.cache.layer(layer)) for layer in range(2)]
    new = [tuple(x.new_zeros(x.shape[0] + 1, *x.shape[1:]) for x in pair) for pair in old]
    end = work.start + work.tokens

    def preallocated(layer: int) -> list[torch.Tensor]:
        for target, source, packed in zip(
            new[layer], old[layer], (work.key, work.value), strict=True
        ):
            target[:-1].copy_(source)
            target[-1, :, work.start : end].copy_(packed[layer].transpose(0, 1))
        return [target[-1, :, work.start : end] for target in new[layer]]

    def concatenated(layer: int) -> list[torch.Tensor]:
        padding = (0, 0, work.start, work.capacity - end)
        made = []
        for source, packed in zip(old[layer], (work.key, work.value), strict=True):
            row = torch.nn.functional.pad(packed[layer].transpose(0, 1), padding)
            made.append(torch.cat((source, row[None])))
        return [whole[-1, :, work.start : end] for whole in made]

    def check_rows(rows: object) -> None:
        for row, packed in zip(rows, (work.key, work.value), strict=True):
            assert_same_bits(row, packed[0].transpose(0, 1), "inserted columns")

    return [
        Way("torch, one row in place", work.per_layer(in_place, work.half),
            work.check_at(work.start, layer=work.half), reset=work.reset),
        Way("preallocated copy of the batch",
            [functools.partial(preallocated, i) for i in range(2)], check_rows),
        Way("pad + concatenate", [functools.partial(concatenated, i) for i in range(2)],
            check_rows),
    ]  # fmt: skip


def extract(options: Options) -> Iterator[Work]:
    """One query leaves, packed: into existing memory, and into new memory."""
    for dtype in options.dtypes:
        work = CopyWork(options, dtype)
        work.place()
        yield extract_into(options, work)
        # Nothing is freed meanwhile and nothing is free at the beginning, so that all results are
        # new.
        held: list[object] = []
        yield extract_new(options, work, held)
        held.clear()


def extract_into(options: Options, work: CopyWork) -> Work:
    """A server's buffers for every layer."""
    index = (work.cu_seqlens, work.slot, work.column)
    outs = [(key.clone(), value.clone()) for key, value in zip(work.key, work.value, strict=True)]

    def ours(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        caches = work.cache.layer(layer)
        return extract_kv(*caches, *index, total_tokens=work.tokens, out=outs[layer])

    def with_torch(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        for target, x in zip(outs[layer], work.columns(layer, work.start), strict=True):
            target.copy_(x.transpose(0, 1))
        return outs[layer]

    def reset(layer: int) -> None:
        for x in outs[layer]:
            x.fill_(UNTOUCHED)

    def way(name: str, call: Callable[[int], object], first: int, kind: str = PEER) -> Way:
        check = functools.partial(work.check_packed, layer=first)
        calls = work.per_layer(call, first)
        return Way(name, calls, check, kind, functools.partial(reset, first))

    ways = [way("extract_kv(out=)", ours, 0, OURS)]
    ways += options.peers(lambda: [way("torch, copy_", with_torch, work.half)])
    return Work(
        f"{work.tokens} tokens, one layer, out=", dtype_name(work.key.dtype),
        [*ways, *memcpy(options, work.bytes)], bytes=work.bytes, ceiling="memcpy",
    )  # fmt: skip


def extract_new(options: Options, work: CopyWork, held: list[object]) -> Work:
    """Results that a call allocates; `held` keeps them alive."""
    index = (work.cu_seqlens, work.slot, work.column)

    def ours(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return extract_kv(*work.cache.layer(layer), *index, total_tokens=work.tokens)

    def with_torch(layer: int) -> tuple[torch.Tensor, ...]:
        return tuple(x.transpose(0, 1).contiguous() for x in work.columns(layer, work.start))

    def keep(call: Callable[[], object]) -> object:
        held.append(call())
        return held[-1]

    def holding(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
        return [functools.partial(keep, call) for call in calls]

    check = work.check_packed
    theirs = functools.partial(work.check_packed, layer=work.half)
    # Before the first call, by which time the memory of other works has been freed.
    release = options.device.release_free_memory
    ways = [Way("extract_kv", holding(work.per_layer(ours)), check, OURS, release)]
    others = work.per_layer(with_torch, work.half)
    ways += options.peers(
        lambda: [Way("torch, slice made contiguous", holding(others), theirs)]
    )  # fmt: skip
    copies = holding(options.device.copiers_to_new(work.bytes))
    if copies:
        ways.append(Way("C memcpy of the same bytes", copies, kind=LIMIT))
    return Work(
        f"{work.tokens} tokens, one layer, new memory", dtype_name(work.key.dtype), ways,
        bytes=work.bytes, ceiling="memcpy",
    )  # fmt: skip


def move(options: Options) -> Iterator[Work]:
    """Moves one row by 64 columns, overlapping itself, and to columns that do not overlap it."""
    for dtype in options.dtypes:
        work = CopyWork(options, dtype)
        work.place()
        near = work.start + (2 if work.tiny else 64)
        far = work.start + work.tokens
        for label, target in (("64 columns to the right, over itself", near), ("apart", far)):
            device = options.device.name
            places = [
                int32(numbers, device)
                for numbers in ([SLOT], [work.start], [SLOT], [target], [work.tokens])
            ]

            def one(layer: int, work=work, places=places) -> None:
                move_kv(*work.cache.layer(layer), *places)

            def with_torch(layer: int, work=work, target=target) -> None:
                pairs = zip(
                    work.columns(layer, target), work.columns(layer, work.start), strict=True
                )
                for to, source in pairs:
                    to.copy_(source.clone())

            check = work.check_at(target, others=False)
            theirs = work.check_at(target, others=False, layer=work.half)
            ways = [
                Way("move_kv", work.per_layer(one), check, OURS, work.place),
                *options.peers(
                    lambda w=work, c=theirs, f=with_torch: [
                        Way("torch, clone and copy", w.per_layer(f, w.half), c, reset=w.place)
                    ]
                ),
                *memcpy(options, work.bytes),
            ]
            yield Work(
                f"{work.tokens} columns, {label}", dtype_name(dtype), ways,
                bytes=work.bytes, ceiling="memcpy",
            )  # fmt: skip


def append(options: Options) -> Iterator[Work]:
    """A decode step's 30 appends with rotary embedding, compared with that step's attention."""
    rows = 2 if options.tiny else 16
    lengths = [4, 9] if options.tiny else decode_lengths(rows, 128, 2048, 686)
    for dtype in options.dtypes:
        device = options.device.name
        work = AttentionWork(
            SMOLLM2, [1] * rows, lengths, capacity=max(lengths), dtype=dtype, device=options.device,
        )  # fmt: skip
        key, value = (work.query[:, : SMOLLM2.kv].clone() for _ in range(2))
        angles = torch.arange(rows * SMOLLM2.dim // 2, device=device).view(rows, -1) / 100.0
        cos, sin = angles.cos(), angles.sin()
        slots, columns = work.index[0], work.index[2] - 1
        layers = range(2 if options.tiny else LAYERS)

        def appends(work=work, key=key, value=value, cos=cos, sin=sin, slots=slots,
                    columns=columns, layers=layers) -> torch.Tensor:  # fmt: skip
            for layer in layers:
                rotated = append_kv(
                    key, value, *work.cache.layer(layer % work.layers), slots, columns,
                    query=work.query, cos=cos, sin=sin,
                )  # fmt: skip
            return rotated

        attention = work.calls(ragged_attention)

        def attends(attention=attention, layers=layers) -> None:
            for layer in layers:
                attention[layer % len(attention)]()

        def check(rotated: torch.Tensor, query=work.query, cos=cos, sin=sin) -> None:
            first, second = query.double().chunk(2, -1)
            c, s = cos.double()[:, None], sin.double()[:, None]
            truth = torch.cat((first * c - second * s, second * c + first * s), -1)
            bound = 2 * torch.finfo(query.dtype).eps * truth.abs().max()
            error = (rotated.double() - truth).abs().max()
            assert error <= bound, f"rotated query errs by {error:.3e}, allowed {bound:.3e}"

        yield Work(
            f"{len(layers)} layers x {rows} rows, {SMOLLM2}", dtype_name(dtype),
            [Way("append_kv with rotary", [appends], check, OURS),
             Way("ragged_attention of the step", [attends])],
        )  # fmt: skip


def append_summary(rows: list[Row]) -> list[str]:
    """Appending as a share of attention."""
    return [
        f"{row.dtype}: append_kv takes {1 / row.ratio:.1%} of the step's attention"
        for row in rows
        if row.kind != OURS and row.ratio
    ]
