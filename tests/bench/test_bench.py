"""The relay benchmark on a tiny random Llama: its gate, its figures, its memory account."""

import json
from pathlib import Path

import pytest
import torch
from bench_package import import_bench

from baton_engines.testing.small_llama import small_llama


@pytest.fixture(scope="module")
def command():
    return import_bench("relay")


@pytest.fixture(scope="module")
def bench():
    return import_bench("vs_generate")


@pytest.fixture(scope="module")
def memory():
    return import_bench("memory")


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 200, "max_position_embeddings": 256}
    return small_llama(**sizes, bos_token_id=None, eos_token_id=3, attn_implementation="sdpa")


@pytest.fixture
def jobs(bench):
    generator = torch.Generator().manual_seed(1)
    return [
        bench.Job(torch.randint(4, 200, (2 + 3 * (i % 5),), generator=generator).tolist(), 1 + i)
        for i in range(11)
    ]


@pytest.fixture
def prompts(jobs, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"token_ids": job.token_ids, "max_new_tokens": job.max_new_tokens}) + "\n"
            for job in jobs
        )
    )
    return path


def test_generate_side_gives_each_query_its_own_end(bench, model, jobs):
    answers = bench.run_generate(model, jobs, 4)
    for job, answer in zip(jobs, answers, strict=True):
        alone = bench.run_generate(model, [job], 1)[0]
        assert answer == alone
        assert len(answer) == job.max_new_tokens or answer[-1] == 3


def test_compare(bench, model, jobs):
    lines = []
    result = bench.compare(model, jobs, slots=4, repeats=2, report=lines.append)
    assert (result.equal_queries, result.num_queries, result.equal_tokens) == (11, 11, 1.0)
    assert len(lines) == len(result.ratios) == 2
    assert result.ratios[0] == result.relay_rates[0] / result.generate_rates[0]
    # The patch is taken off again.
    assert "forward" not in model.__dict__


def test_vs_generate_prints_the_ratio(command, bench, model, prompts, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_model", lambda name, dtype: (model, None))
    code = command.main(
        ["--vs-generate", "--prompts", str(prompts), "--slots", "4", "--repeats", "1"]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "11 of 11 queries equal token by token" in printed
    assert "ratio relay / generate" in printed


def test_wrong_answers_get_no_figure(command, bench, model, prompts, monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_model", lambda name, dtype: (model, None))
    original = bench.run_relay
    monkeypatch.setattr(bench, "run_relay", lambda *a: [[x ^ 1 for x in q] for q in original(*a)])
    code = command.main(
        ["--vs-generate", "--prompts", str(prompts), "--slots", "4", "--repeats", "1"]
    )
    assert code == 1
    assert "ratio relay / generate" not in capsys.readouterr().out


def test_common_prefix(bench):
    assert bench.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert bench.common_prefix([1, 2], [1, 2, 4]) == 2
    assert bench.common_prefix([], [1]) == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_adds_up(memory, model, jobs):
    case = memory.measure_memory(model, memory.short_jobs(jobs, 24), 4)
    assert case.num_queries == 24
    assert case.weights == 4 * sum(p.numel() for p in model.parameters())
    assert 0 < case.cache_in_use <= case.cache_committed
    assert case.peak == case.process + case.weights + case.cache_committed + case.workspace


@pytest.mark.parametrize(
    "per_query, code, word", [(0, 0, "constant"), (1 << 20, 1, "GROWS")], ids=["flat", "growing"]
)
def test_memory_gate(command, memory, monkeypatch, capsys, per_query, code, word):
    def child(command, **_):
        count = int(command[command.index("--memory-case") + 1])
        workspace = count * per_query
        case = memory.MemoryCase(count, 1, 1, 1, 1, 1, workspace, 5 + workspace)
        return type("Done", (), {"stdout": json.dumps(case.__dict__)})

    monkeypatch.setattr(memory.subprocess, "run", child)
    monkeypatch.setattr(memory, "describe_run", lambda: "")
    assert command.main(["--memory"]) == code
    assert word in capsys.readouterr().out
