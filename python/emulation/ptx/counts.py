"""Instructions and traffic of a call of each op, counted on the PTX machine.

The shapes are those of a decode step and of a newcomer's prefill (8 KV heads x 128, bf16)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from baton_kernels.testing import cumulative, int32
from emulation.ptx.machine import Machine
from emulation.ptx.ops import PtxOps

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op; its arguments are made when they are needed."""

    op: str
    what: str
    make: Callable[[], dict[str, object]]
    payload: int  # bytes of keys, values (and queries) that are moved

    @functools.cached_property
    def arguments(self) -> dict[str, object]:
        return self.make()


@dataclasses.dataclass(frozen=True)
class Counts:
    launches: int
    instructions: float  # warp instructions per 128 bytes of payload
    sectors: float  # 32-byte sectors of all loads and stores over those that the payload needs


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DTYPE)


def insert_case(tokens: int, layers: int, queries: int) -> Case:
    token, slot = (NUM_KV_HEADS, HEAD_DIM), (queries, NUM_KV_HEADS, tokens // queries + 8, HEAD_DIM)

    def arguments() -> dict[str, object]:
        return {
            "key": numbers(layers, tokens, *token), "value": numbers(layers, tokens, *token),
            "key_cache": numbers(layers, *slot), "value_cache": numbers(layers, *slot),
            "cu_seqlens": cumulative([tokens // queries] * queries),
            "slots": int32(range(queries)), "starts": int32([3] * queries),
        }  # fmt: skip

    payload = 2 * 2 * layers * tokens * NUM_KV_HEADS * HEAD_DIM
    what = f"{layers} layers, {queries} x {tokens // queries} tokens"
    return Case("insert_kv", what, arguments, payload)


def extract_case(tokens: int, layers: int, queries: int) -> Case:
    inserted = insert_case(tokens, layers, queries)
    names = ("key_cache", "value_cache", "cu_seqlens", "slots", "starts")

    def arguments() -> dict[str, object]:
        return {name: inserted.arguments[name] for name in names} | {"total_tokens": tokens}

    return Case("extract_kv", inserted.what, arguments, inserted.payload)


def move_case(layers: int, rows: int, length: int, shift: int) -> Case:
    shape = (layers, rows, NUM_KV_HEADS, length + shift, HEAD_DIM)

    def arguments() -> dict[str, object]:
        return {
            "key_cache": numbers(*shape), "value_cache": numbers(*shape),
            "source_slots": int32(range(rows)), "source_starts": int32([0] * rows),
            "target_slots": int32(range(rows)), "target_starts": int32([shift] * rows),
            "lengths": int32([length] * rows),
        }  # fmt: skip

    payload = 2 * 2 * layers * rows * length * NUM_KV_HEADS * HEAD_DIM
    what = f"{layers} layers, {rows} x {length} columns by {shift}"
    return Case("move_kv", what, arguments, payload)


def append_case(rows: int, num_heads: int = 0, head_dim: int = HEAD_DIM) -> Case:
    slot = (rows, NUM_KV_HEADS, 4, head_dim)
    token = (rows, NUM_KV_HEADS, head_dim)

    def arguments() -> dict[str, object]:
        made = {
            "key": numbers(*token), "value": numbers(*token),
            "key_cache": numbers(*slot), "value_cache": numbers(*slot),
            "slots": int32(range(rows)), "columns": int32([1] * rows),
        }  # fmt: skip
        if num_heads:
            angle = numbers(rows, head_dim // 2).float()
            made |= {"query": numbers(rows, num_heads, head_dim)}
            made |= {"cos": angle.cos(), "sin": angle.sin()}
        return made

    what = f"{rows} rows" + (", rotary, query" if num_heads else "")
    if head_dim != HEAD_DIM:
        what += f", {head_dim} dims"
    payload = 2 * rows * (2 * NUM_KV_HEADS + num_heads) * head_dim
    return Case("append_kv", what, arguments, payload)


def merge_case(tokens: int, num_heads: int) -> Case:
    rows = (tokens, num_heads)

    def arguments() -> dict[str, object]:
        return {
            "out_a": numbers(*rows, HEAD_DIM), "lse_a": numbers(*rows).float(),
            "out_b": -numbers(*rows, HEAD_DIM), "lse_b": numbers(*rows).float(),
        }  # fmt: skip

    what = f"{tokens} x {num_heads} heads"
    return Case("merge_attention", what, arguments, 2 * tokens * num_heads * HEAD_DIM)


def run_on_ptx(case: Case, architecture: int = 80) -> PtxOps:
    """The call executed from PTX; the backend knows what that took and what the emulator wrote."""
    ops = PtxOps(architecture)
    with ops.entered():
        getattr(ops, case.op)(**case.arguments)
    return ops


def count(case: Case) -> Counts:
    """Counts of one call."""
    machines = [machine for _, machine in run_on_ptx(case).machines]
    # The payload is loaded and stored once; a merge loads two bytes for each that it stores.
    times = 3 if case.op == "merge_attention" else 2
    return Counts(
        len(machines),
        sum(machine.instructions() for machine in machines) / (case.payload / 128),
        sum(machine.sectors for machine in machines) * 32 / (times * case.payload),
    )


def decode_case(length: int, page: int | None = None, kv_heads: int = NUM_KV_HEADS) -> Case:
    """One decode step of one row, in a slot or in pages of `page` columns; the payload is what its
    keys and values take."""
    num_pages = 1 if page is None else -(-length // page)
    cache = (num_pages, kv_heads, length if page is None else page, HEAD_DIM)

    def arguments() -> dict[str, object]:
        made = {
            "query": numbers(1, NUM_HEADS // NUM_KV_HEADS * kv_heads, HEAD_DIM),
            "key_cache": numbers(*cache), "value_cache": -numbers(*cache),
            "cu_seqlens_q": cumulative([1]), "slots": int32([0]), "starts": int32([0]),
            "lengths": int32([length]), "max_query_length": 1, "max_length": length,
        }  # fmt: skip
        if page is not None:
            # Any order: that of the pages in memory is not looked at.
            made |= {"slots": None, "block_table": int32(range(num_pages)).flip(0)[None]}
        return made

    payload = 2 * 2 * kv_heads * length * HEAD_DIM
    return Case("ragged_attention", f"decode, {length} keys", arguments, payload)


@dataclasses.dataclass(frozen=True)
class DecodeCounts:
    """Counts of a decode step, per 128 bytes of keys and values unless stated otherwise."""

    instructions: float  # of warps, in the loop
    products: float  # mma.sync m16n8k16, likewise
    wavefronts: float  # of shared memory, likewise
    loop_sectors: float  # sectors over useful ones, likewise
    sectors: float  # with queries, results, partial results of splits and their merge
    fixed: float  # instructions per KV head that do not grow with the keys: all warps
    merge: float  # instructions per KV head of the second launch
    all_wavefronts: int  # of the whole step
    ideal_wavefronts: int


def count_decode(length: int = 512, page: int | None = None) -> DecodeCounts:
    """The loop is what twice the keys of an unsplit row add."""
    ((_, short),) = run_on_ptx(decode_case(128, page)).machines
    ((_, long),) = run_on_ptx(decode_case(256, page)).machines
    case = decode_case(length, page)
    machines = [machine for _, machine in run_on_ptx(case).machines]
    lines = decode_case(128).payload / 128

    def loop(figure) -> float:
        return (figure(long) - figure(short)) / lines

    instructions = loop(Machine.instructions)
    return DecodeCounts(
        instructions,
        loop(lambda machine: machine.instructions("mma")),
        loop(lambda machine: machine.wavefronts),
        loop(lambda machine: machine.sectors) / 4,
        sum(machine.sectors for machine in machines) * 32 / case.payload,
        (long.instructions() - 2 * lines * instructions) / NUM_KV_HEADS,
        sum(machine.instructions() for machine in machines[1:]) / NUM_KV_HEADS,
        sum(machine.wavefronts for machine in machines),
        sum(machine.ideal_wavefronts for machine in machines),
    )


class NotExecuted:
    """Replaces a machine whose results are not used."""

    def launch(self, *arguments) -> None:
        pass


class MergeOps(PtxOps):
    """Executes only the merge, for sm_90, where it is launched behind the kernel before."""

    def __init__(self) -> None:
        super().__init__(90)

    def machine(self, op: str, kernel: str) -> Machine | NotExecuted:
        return super().machine(op, kernel) if "merge" in kernel else NotExecuted()


@dataclasses.dataclass(frozen=True)
class MergeCounts:
    """Instructions of one warp of the launch behind a decode step, and its warps per KV head."""

    before: float  # until it waits for the decode kernel: executed while that one runs
    after: float
    warps: int


def count_merge(length: int, kv_heads: int = NUM_KV_HEADS) -> MergeCounts:
    """Counts of the merge. With one KV head a lane has one dim, with eight it has 4, as on a device
    of two multiprocessors."""
    ops = MergeOps()
    with ops.entered():
        ops.ragged_attention(**decode_case(length, kv_heads=kv_heads).arguments)
    _, merge = ops.machines[-1]
    warps = merge.count // 32
    before = merge.waits_from / warps
    return MergeCounts(before, merge.instructions() / warps - before, warps // kv_heads)


def prefill_case(length: int) -> Case:
    """The last tokens of a prompt, one tile of 128 query vectors of one KV head."""
    group = NUM_HEADS // NUM_KV_HEADS

    def arguments() -> dict[str, object]:
        return {
            "query": numbers(128 // group, group, HEAD_DIM),
            "key_cache": numbers(1, 1, length, HEAD_DIM),
            "value_cache": -numbers(1, 1, length, HEAD_DIM),
            "cu_seqlens_q": cumulative([128 // group]), "slots": int32([0]), "starts": int32([0]),
            "lengths": int32([length]), "max_length": length,
        }  # fmt: skip

    return Case("ragged_attention", f"prefill, {length} keys", arguments, 2 * 2 * length * HEAD_DIM)


# Data sheets: dense bfloat16 in TFLOP/s, and that in products and sums of an SM per cycle.
RATES = {"A100": (312.0, 1024), "H100": (989.4, 2048)}


@dataclasses.dataclass(frozen=True)
class PrefillCounts:
    """Counts of a tile of 128 query vectors and 128 keys which all of them see, on one SM."""

    instructions: float  # of warps
    wavefronts: float  # of shared memory
    ideal_wavefronts: float
    flops: int = 2 * 2 * 128 * 128 * HEAD_DIM

    def cycles(self, card: str) -> float:
        """Cycles of the card's tensor cores."""
        return self.flops / 2 / RATES[card][1]

    def tflops(self, card: str) -> float:
        """The part of a card's rate that products, issue slots (four schedulers) and shared memory
        (one wavefront per cycle) allow; a bound, not a speed."""
        needed = max(self.cycles(card), self.instructions / 4, self.wavefronts)
        return RATES[card][0] * self.cycles(card) / needed

    @property
    def wavefronts_per_product(self) -> float:
        """Per m16n8k16."""
        return self.wavefronts / (self.flops / 2 / (16 * 8 * 16))


def count_prefill(kernel: str) -> PrefillCounts:
    """Counts of the kernel that BATON_PREFILL calls this. The loop is what 128 more keys add."""
    machines = []
    for length in (256, 384):
        ops = PtxOps(prefill=kernel)
        with ops.entered():
            ops.ragged_attention(**prefill_case(length).arguments)
        kind = "warpgroup" if kernel == "wgmma" else "prefill"
        machines += [machine for name, machine in ops.machines if kind in name]
    short, long = machines
    return PrefillCounts(
        long.instructions() - short.instructions(),
        long.wavefronts - short.wavefronts,
        long.ideal_wavefronts - short.ideal_wavefronts,
    )


def benchmark_cases() -> list[Case]:
    return [
        insert_case(512, 32, 1),
        insert_case(2048, 8, 4),
        insert_case(16, 32, 1),
        insert_case(16, 32, 16),
        insert_case(64, 32, 16),
        insert_case(128, 32, 16),
        insert_case(16, 1, 16),
        insert_case(64, 1, 16),
        extract_case(512, 32, 1),
        move_case(8, 4, 256, 1),
        move_case(8, 4, 256, 64),
        append_case(64),
        append_case(64, 32),
        append_case(16, 32),
        append_case(64, 32, 64),
        merge_case(64, 32),
    ]
