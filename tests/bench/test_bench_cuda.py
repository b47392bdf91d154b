"""The kernel benchmark for GPUs, run on the CPU in place of a GPU."""

import importlib.machinery
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from bench_package import import_bench
from fake_cuda import fake_cuda
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def modules():
    """Returns a module of bench.kernels by its name."""
    return lambda name: import_bench(f"kernels.{name}")


@pytest.fixture(scope="module")
def main(modules):
    return modules("__main__")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def options(main, monkeypatch):
    with fake_cuda(monkeypatch):
        arguments = ["--tiny", "--dtype", "float32", "--device", "cuda"]
        made = main.make_options(main.arguments(arguments))
        assert not made.flex  # minutes per shape
        made.device.gemm_size = 32
        yield made


@pytest.mark.parametrize("case", import_bench("kernels.__main__").CASES)
def test_case_runs_on_a_gpu_as_far_as_a_cpu_can_tell(main, options, case):
    rows, lines = main.run_case(case, options)
    assert len(lines) >= len(main.CASES[case].ceilings)
    # How accurate a peer is depends on the CPU that stands in: the gate may reject one.
    without = {"peer": ("missing: ", "refused: ")}
    assert all(
        row.median_us or row.note.startswith(without.get(row.kind, "missing: ")) for row in rows
    )
    # The last four measure things that only a CPU has.
    without_rows = ("ceilings", "overhead", "step", "prefix", "packed", "eight_bit")
    assert bool(rows) == (case not in without_rows)
    if case == "decode":
        ways = {row.way for row in rows}
        assert {"flash-attn, with_kvcache", "FlashInfer, a page per slot"} <= ways
        assert "read of the same bytes" in ways
    if case == "insert":
        assert "device copy of the same bytes" in {row.way for row in rows}


def test_a_call_is_timed_when_the_host_was_ahead_of_the_device(options, monkeypatch):
    """If it was not, the device sleeps longer the next time."""
    cycles, begun = [], iter([True, True, False, False])
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: next(begun))
    calls = []
    options.device.clock(lambda: calls.append(1))
    options.device.clock(lambda: calls.append(2))
    first = cycles[0]
    assert cycles == [first, 2 * first, 4 * first, 4 * first]
    assert calls == [1, 1, 1, 2]


READ = """
import torch
from bench.kernels.cuda_read import BLOCK, read
# Five programs: some have no block, each has one, or some have one more than the others.
for count in (1, BLOCK - 1, 5 * BLOCK, 12 * BLOCK + 3):
    words = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32)
    total = int(read(words, programs=5).sum(dtype=torch.int64))
    assert (total - int(words.sum(dtype=torch.int64))) % 2**32 == 0, count
print("read")
"""


def test_the_read_kernel_reads_everything():
    done = subprocess.run(
        [sys.executable, "-c", READ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "read", done.stderr


def flash_attn(q, k_cache, v_cache, *, cache_seqlens):
    """flash_attn_with_kvcache according to its documentation: [batch, columns, heads, dim]."""
    outs = []
    for query, key, value, length in zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True):
        group = query.shape[1] // key.shape[1]
        k, v = (x[:length].repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
        outs.append(scaled_dot_product_attention(query.transpose(0, 1), k, v).transpose(0, 1))
    return torch.stack(outs)


class FlashInferWrapper:
    """FlashInfer's decode wrapper according to its documentation: [pages, heads, page size,
    dim]."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert workspace.dtype == torch.uint8 and layout == "HND"
        assert isinstance(use_tensor_cores, bool)

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim,
             page_size, *, q_data_type, kv_data_type):  # fmt: skip
        assert q_data_type == kv_data_type == torch.float32
        assert indptr.tolist() == list(range(len(indices) + 1))
        self.pages, self.lengths = indices.long(), last_page_len
        self.shape = num_kv_heads, page_size, head_dim

    def run(self, query, caches):
        keys, values = (x[self.pages] for x in caches)
        assert keys.shape[1:] == self.shape
        return flash_attn(
            query[:, None], keys.transpose(1, 2), values.transpose(1, 2),
            cache_seqlens=self.lengths,
        )[:, 0]  # fmt: skip


def test_gpu_peers_are_called_by_their_documentation(options, modules, monkeypatch):
    fakes = {
        "flash_attn": {"flash_attn_with_kvcache": flash_attn},
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": FlashInferWrapper},
    }
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    works = [work for work in modules("attention_cases").decode(options)]
    for work in works:
        peers = {way.name: way for way in work.ways}
        for name in ("flash-attn, with_kvcache", "FlashInfer, a page per slot"):
            assert peers[name].calls, peers[name].missing
            assert modules("measure").refused(peers[name]) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU; there is one")
def test_cuda_without_a_gpu_says_so(main):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--device", "cuda"])
    assert str(stopped.value) == (
        "bench.kernels: --device cuda needs a GPU that torch can use, and finds none"
    )
