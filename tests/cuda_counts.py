"""What a launch of each copy kernel executes and moves, counted on the PTX machine.

The shapes are those of a decode step and of a newcomer's prefill (8 KV heads x 128, bf16)."""

from __future__ import annotations

import dataclasses
import functools

import torch
from emulation import build
from emulation.ops import EmulatedOps
from ptx_machine import Machine, compile_ptx

from baton_kernels.testing import cumulative, int32

NUM_KV_HEADS, HEAD_DIM, DTYPE = 8, 128, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op, and the kernel that it launches (a part of the mangled name)."""

    op: str
    what: str
    kernel: str
    arguments: dict[str, object]
    payload: int  # bytes of keys, values (and queries) that are moved

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.arguments.values() if isinstance(x, torch.Tensor)]


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
    arguments = {
        "key": numbers(layers, tokens, *token), "value": numbers(layers, tokens, *token),
        "key_cache": numbers(layers, *slot), "value_cache": numbers(layers, *slot),
        "cu_seqlens": cumulative([tokens // queries] * queries),
        "slots": int32(range(queries)), "starts": int32([3] * queries),
    }  # fmt: skip
    payload = 2 * 2 * layers * tokens * NUM_KV_HEADS * HEAD_DIM
    what = f"{layers} layers, {queries} x {tokens // queries} tokens"
    return Case("insert_kv", what, "insert_kv_kernelILi16E", arguments, payload)


def extract_case(tokens: int, layers: int, queries: int) -> Case:
    inserted = insert_case(tokens, layers, queries)
    names = ("key_cache", "value_cache", "cu_seqlens", "slots", "starts")
    arguments = {name: inserted.arguments[name] for name in names} | {"total_tokens": tokens}
    return Case("extract_kv", inserted.what, "extract_kv_kernelILi16E", arguments, inserted.payload)


def move_case(layers: int, rows: int, length: int, shift: int) -> Case:
    shape = (layers, rows, NUM_KV_HEADS, length + shift, HEAD_DIM)
    arguments = {
        "key_cache": numbers(*shape), "value_cache": numbers(*shape),
        "source_slots": int32(range(rows)), "source_starts": int32([0] * rows),
        "target_slots": int32(range(rows)), "target_starts": int32([shift] * rows),
        "lengths": int32([length] * rows),
    }  # fmt: skip
    payload = 2 * 2 * layers * rows * length * NUM_KV_HEADS * HEAD_DIM
    what = f"{layers} layers, {rows} x {length} columns by {shift}"
    return Case("move_kv", what, "move_kv_kernelILi16E", arguments, payload)


def append_case(rows: int, num_heads: int = 0) -> Case:
    slot = (rows, NUM_KV_HEADS, 4, HEAD_DIM)
    token = (rows, NUM_KV_HEADS, HEAD_DIM)
    arguments = {
        "key": numbers(*token), "value": numbers(*token),
        "key_cache": numbers(*slot), "value_cache": numbers(*slot),
        "slots": int32(range(rows)), "columns": int32([1] * rows),
    }  # fmt: skip
    kernel, what = "append_kv_kernelI13__nv_bfloat16S3_Li8ELb0E", f"{rows} rows"
    if num_heads:
        angle = numbers(rows, HEAD_DIM // 2).float()
        arguments |= {"query": numbers(rows, num_heads, HEAD_DIM)}
        arguments |= {"cos": angle.cos(), "sin": angle.sin()}
        kernel, what = "append_kv_kernelI13__nv_bfloat16fLi8ELb1E", f"{rows} rows, rotary, query"
    payload = 2 * rows * (2 * NUM_KV_HEADS + num_heads) * HEAD_DIM
    return Case("append_kv", what, kernel, arguments, payload)


def merge_case(tokens: int, num_heads: int) -> Case:
    arguments = {
        "out_a": numbers(tokens, num_heads, HEAD_DIM), "lse_a": numbers(tokens, num_heads).float(),
        "out_b": -numbers(tokens, num_heads, HEAD_DIM), "lse_b": numbers(tokens, num_heads).float(),
    }  # fmt: skip
    what = f"{tokens} x {num_heads} heads"
    kernel = "merge_attention_kernelI13__nv_bfloat16Li8E"
    return Case("merge_attention", what, kernel, arguments, 2 * tokens * num_heads * HEAD_DIM)


@functools.cache
def machine_code(op: str, architecture: int = 80) -> str:
    return compile_ptx(build.ROOT / "csrc" / "cuda" / f"{op}.cu", architecture)


def written(result: object, case: Case) -> list[torch.Tensor]:
    """Everything that a call writes: what it returned, and the caches."""
    outputs = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return outputs + [
        case.arguments[n] for n in ("key_cache", "value_cache") if n in case.arguments
    ]


def run_on_ptx(case: Case, architecture: int = 80) -> tuple[list, list, Machine, int]:
    """What the emulator and the PTX machine write in one call, the machine, and the launches.

    The launch (grid, block, argument bytes) is recorded from the host code; both then work on the
    same memory, one after the other.
    """
    ops = EmulatedOps(build.FAST)
    before = {name: x.clone() for name, x in case.arguments.items() if isinstance(x, torch.Tensor)}
    results = []
    launches = ops.module.record(lambda: results.append(getattr(ops, case.op)(**case.arguments)))
    outputs = written(results[0], case)
    expected = [x.clone() for x in outputs]
    for x in outputs:
        x.fill_(float("nan"))
    for name, x in before.items():
        case.arguments[name].copy_(x)
    machine = Machine(machine_code(case.op, architecture), case.kernel)
    grid, block, _, arguments = launches[0]
    machine.launch(grid, block, arguments, case.tensors() + outputs)
    return expected, outputs, machine, len(launches)


def count(case: Case) -> Counts:
    """Counts of one call."""
    _, _, machine, launches = run_on_ptx(case)
    # The payload is loaded and stored once; a merge loads two bytes for each that it stores.
    times = 3 if case.op == "merge_attention" else 2
    return Counts(
        launches,
        machine.instructions() / (case.payload / 128),
        machine.sectors * 32 / (times * case.payload),
    )


def benchmark_cases() -> list[Case]:
    return [
        insert_case(512, 32, 1),
        insert_case(2048, 8, 4),
        extract_case(512, 32, 1),
        move_case(8, 4, 256, 1),
        move_case(8, 4, 256, 64),
        append_case(64),
        append_case(64, 32),
        merge_case(64, 32),
    ]
