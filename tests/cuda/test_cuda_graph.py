"""CUDA graphs: launches captured once serve every later shape of the batch.

A graph keeps each launch's grid and arguments; only the contents of memory may change between two
replays. Without a GPU the emulator does the same: it keeps the launches of a call and runs them
again, without the host code that made them.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from gpus import needs_gpu

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import Accuracy, assert_same_bits, cumulative, int32, poison_
from emulation.cuda.backends import EMULATED

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ROWS, NUM_SLOTS, CAPACITY, HEADS, KV_HEADS = 4, 6, 1300, 4, 2
# Slots, starts and lengths of one decode step each: columns grow, rows move, the shortest row
# has only its new token, the longest fills a slot, and rows are split in one, two and three.
SHAPES = {
    "first": ([0, 1, 2, 3], [0, 5, 100, 7], [30, 513, 1024, 1]),
    "one column on": ([0, 1, 2, 3], [0, 5, 100, 7], [31, 514, 1025, 2]),
    "other slots": ([5, 3, 0, 4], [9, 0, 1, 1299], [700, 1300, 64, 1]),
    "shared starts": ([4, 2, 5, 1], [64, 64, 64, 64], [512, 1, 1236, 600]),
}


@dataclasses.dataclass
class Step:
    """A decode step's tensors, whose addresses stay the same."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens_q: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    columns: torch.Tensor

    def run(self, ops):
        """The calls of a captured decode step; the host knows only the largest sizes."""
        rotated = ops.append_kv(
            self.key, self.value, self.key_cache, self.value_cache, self.slots, self.columns,
            query=self.query, cos=self.cos, sin=self.sin,
        )  # fmt: skip
        out, lse = ops.ragged_attention(
            rotated, self.key_cache, self.value_cache, self.cu_seqlens_q, self.slots, self.starts,
            self.lengths, return_lse=True, max_query_length=1, max_length=CAPACITY,
        )  # fmt: skip
        return rotated, out, lse

    def copy(self, device):
        return Step(**{name: x.to(device, copy=True) for name, x in vars(self).items()})

    def fill(self, other):
        """Copies the other's contents into this one's memory."""
        for name, x in vars(self).items():
            x.copy_(getattr(other, name))


def step_of(shape, dtype, head_dim):
    """The step on the CPU: numbers everywhere, NaN in all padding and in the new columns."""
    slots, starts, lengths = shape
    generator = torch.Generator().manual_seed(sum(lengths))

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    caches = []
    for _ in range(2):
        cache = poison_(torch.empty(NUM_SLOTS, KV_HEADS, CAPACITY, head_dim, dtype=dtype))
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            cache[slot, :, start : start + length - 1] = normal(KV_HEADS, length - 1, head_dim)
        caches.append(cache)
    angle = torch.rand(ROWS, head_dim // 2, generator=generator)
    return Step(
        normal(ROWS, HEADS, head_dim), normal(ROWS, KV_HEADS, head_dim),
        normal(ROWS, KV_HEADS, head_dim), *caches, angle.cos(), angle.sin(), cumulative([1] * ROWS),
        int32(slots), int32(starts), int32(lengths),
        int32([start + length - 1 for start, length in zip(starts, lengths, strict=True)]),
    )  # fmt: skip


def blank_step(dtype, head_dim):
    """The tensors during the capture, when nothing may read their contents."""
    step = step_of(SHAPES["first"], dtype, head_dim)
    for x in vars(step).values():
        poison_(x)
    return step


def check_replays(step, results, replay, ops, dtype, head_dim):
    """Every shape through one graph: accurate, and with the bits of a separate call."""
    for name, shape in SHAPES.items():
        expected = step_of(shape, dtype, head_dim)
        step.fill(expected)
        replay()
        called = expected.copy(step.query.device)
        for got, want in zip(results, called.run(ops), strict=True):
            assert_same_bits(got.cpu(), want.cpu(), f"{name}: against a call")
        for cache in ("key_cache", "value_cache"):
            assert_same_bits(getattr(step, cache).cpu(), getattr(called, cache).cpu(), name)
        rotated, out, lse = (x.cpu() for x in results)
        Accuracy(
            "ragged_attention", rotated, called.key_cache.cpu(), called.value_cache.cpu(),
            expected.cu_seqlens_q, expected.slots, expected.starts, expected.lengths,
            return_lse=True,
        ).check((out, lse))  # fmt: skip


# head_dim 24 has no tensor core kernel and uses the generic one.
KINDS = [(torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64), (torch.bfloat16, 24)]


# The judge is slow; races would not depend on the dtype.
CASES = [("cuda-emulated", *kind) for kind in KINDS] + [("cuda-judged", *KINDS[0])]


@pytest.mark.parametrize(("backend", "dtype", "head_dim"), CASES)
def test_launches_of_a_decode_step_serve_every_shape(backend, dtype, head_dim):
    ops = EMULATED[backend]
    step = blank_step(dtype, head_dim)
    with ops.entered():
        results, replay = ops.capture(lambda: step.run(ops))
        check_replays(step, results, replay, ops, dtype, head_dim)


@pytest.mark.parametrize("backend", EMULATED)
def test_rows_of_a_graph_may_stand_idle(backend):
    """A batch smaller than the captured one: slot -1 skips a row, which writes nothing."""
    ops = EMULATED[backend]
    step = blank_step(torch.bfloat16, 64)
    full = step_of(SHAPES["first"], torch.bfloat16, 64)
    with ops.entered():
        expected = full.run(ops)
        part = step_of(SHAPES["first"], torch.bfloat16, 64)
        results, replay = ops.capture(lambda: step.run(ops))
        step.fill(part)
        step.slots[2] = -1
        replay()
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got[[0, 1, 3]], want[[0, 1, 3]])
    assert_same_bits(step.key_cache[2], part.key_cache[2])
    assert_same_bits(step.key_cache[[0, 1, 3]], full.key_cache[[0, 1, 3]])


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("op", ["insert_kv", "move_kv", "extract_kv"])
def test_launches_of_copies_serve_every_shape(backend, op):
    ops = EMULATED[backend]
    packed = [torch.randn(2, 9, 2, 16) for _ in range(2)]
    caches = [torch.randn(2, 4, 2, 12, 16) for _ in range(2)]
    shapes = {
        "insert_kv": [([0, 4, 9], [2, 0], [1, 7]), ([0, 9, 9], [3, 1], [3, 12])],
        "extract_kv": [([0, 4, 9], [2, 0], [1, 7]), ([0, 0, 9], [1, 1], [0, 2])],
        "move_kv": [
            ([0, 1], [0, 3], [0, 1], [2, 0], [9, 5]), ([3, 1], [1, 8], [2, 1], [0, 2], [7, 4]),
        ],
    }[op]  # fmt: skip
    indices = [int32([-(2**31)] * len(x)) for x in shapes[0]]

    def run(namespace, packed, caches, indices):
        if op == "insert_kv":
            return namespace.insert_kv(*packed, *caches, *indices)
        if op == "extract_kv":
            return namespace.extract_kv(*caches, *indices, total_tokens=9)
        return namespace.move_kv(*caches, *indices)

    with ops.entered():
        results, replay = ops.capture(lambda: run(ops, packed, caches, indices))
        for shape in shapes:
            for x, values in zip(indices, shape, strict=True):
                x.copy_(int32(values))
            expected = [x.clone() for x in caches]
            wanted = run(reference, packed, expected, indices)
            replay()
            for got, want in zip([*caches, *(results or [])], [*expected, *(wanted or [])],
                                 strict=True):  # fmt: skip
                assert_same_bits(got, want)


def test_capturing_runs_nothing():
    ops = EMULATED["cuda-emulated"]
    cache, indices = torch.zeros(2, 1, 4, 16), [int32([n]) for n in (0, 0, 1, 0, 4)]
    cache[0] = 1
    with ops.entered():
        _, replay = ops.capture(lambda: ops.move_kv(cache, cache.clone(), *indices))
        assert not cache[1].any()
        replay()
        assert cache[1].all()


FORBIDDEN = re.compile(
    r"\b(cuda(Malloc|Free|Memcpy|Memset|Host|Register)\w*|cuda\w*Synchronize|cudaStreamWait\w*"
    r"|cudaEvent\w*|item\(\))"
)
# A comment may name functions that the code must not call.
COMMENT = re.compile(r"//[^\n]*")


@pytest.mark.parametrize("folder", ["cuda", "bindings/cuda"])
def test_the_host_neither_waits_nor_allocates(folder):
    sources = sorted(p for p in (CSRC / folder).iterdir() if p.suffix in {".h", ".cpp", ".cu"})
    assert sources
    for path in sources:
        found = FORBIDDEN.search(COMMENT.sub("", path.read_text()))
        assert not found, f"{path}: {found[0]}"


@pytest.mark.parametrize(
    "call", ["cudaMalloc(&p, 4)", "cudaMemcpyAsync(a, b, 4)", "cudaStreamSynchronize(s)"]
)
def test_forbidden_calls_are_seen(call):
    assert FORBIDDEN.search(call)


# On a GPU.


@needs_gpu
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
def test_gpu_graph_of_a_decode_step_serves_every_shape(dtype, head_dim):
    """Checks on the device everything that a test found on the emulator."""
    step = step_of(SHAPES["first"], dtype, head_dim).copy("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        # Kernels are loaded when they first run, which must not happen during a capture.
        step.run(baton_kernels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    step.fill(blank_step(dtype, head_dim))
    with torch.inference_mode(), torch.cuda.graph(graph):
        results = step.run(baton_kernels)

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    with torch.inference_mode():
        check_replays(step, results, replay, baton_kernels, dtype, head_dim)


@needs_gpu
def test_gpu_call_runs_on_the_current_stream():
    """Work of another stream comes first if this stream waits for it, and only then."""
    step = step_of(SHAPES["first"], torch.bfloat16, 64).copy("cuda")
    expected = step.run(baton_kernels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        results = step.run(baton_kernels)
    assert not stream.query()
    stream.synchronize()
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got.cpu(), want.cpu())
