"""The workloads: lengths and arrivals as promised, and the same every time."""

import statistics

import pytest
from bench_package import import_bench

workloads = import_bench("workloads")


def test_orca_draws_its_lengths():
    requests = workloads.orca(4000, seed=1)
    prompts = [request.prompt_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    assert (min(prompts), max(prompts)) == (32, 512)
    assert (min(outputs), max(outputs)) == (1, 128)
    # Three standard errors of the mean of 4000 draws.
    assert statistics.mean(prompts) == pytest.approx(272, abs=6.6)
    assert statistics.mean(outputs) == pytest.approx(64.5, abs=1.8)
    assert {request.arrival_seconds for request in requests} == {0.0}


def test_orca_is_the_same_every_time():
    assert workloads.orca(9, seed=3) == workloads.orca(20, seed=3)[:9]
    assert workloads.orca(9, seed=3) != workloads.orca(9, seed=4)


def test_divisor_rounds_up():
    whole, small = workloads.orca(50), workloads.orca(50, divisor=8)
    for a, b in zip(whole, small, strict=True):
        assert b.prompt_tokens == -(-a.prompt_tokens // 8)
        assert b.output_tokens == -(-a.output_tokens // 8)
    assert min(request.output_tokens for request in workloads.orca(50, divisor=1000)) == 1


def test_azure_reads_the_trace():
    requests = workloads.azure("conv", 400)
    # The first row of the file, unchanged.
    assert requests[0] == workloads.Request(0.0, 4084, 66)
    assert [r.arrival_seconds for r in requests] == sorted(r.arrival_seconds for r in requests)
    assert statistics.median(r.prompt_tokens for r in requests) == pytest.approx(1009, abs=1)
    assert workloads.azure("conv", 5, first=7) != requests[7:12]  # arrivals begin anew
    assert [r.prompt_tokens for r in workloads.azure("conv", 5, first=7)] == [
        r.prompt_tokens for r in requests[7:12]
    ]


def test_azure_arrivals_are_compressed():
    real, fast = workloads.azure("code", 40), workloads.azure("code", 40, compression=4)
    assert real[-1].arrival_seconds > 1
    for a, b in zip(real, fast, strict=True):
        assert b.arrival_seconds == pytest.approx(a.arrival_seconds / 4)


def test_azure_timestamps(tmp_path):
    (tmp_path / "azure_llm_2023_code.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.9799600,4808,10\n"
        "2023-11-17 00:00:01.0319601,3180,8\n"
        "2023-11-17 00:01:00,31,1\n"
    )
    requests = workloads.azure("code", 3, divisor=10, folder=tmp_path)
    assert [r.arrival_seconds for r in requests] == pytest.approx([0, 1.0520001, 60.02004])
    assert [r.prompt_tokens for r in requests] == [481, 318, 4]
    assert [r.output_tokens for r in requests] == [1, 1, 1]


@pytest.mark.parametrize("arguments", [("talk", 3), ("conv", 401), ("conv", 0)])
def test_azure_refuses(arguments):
    with pytest.raises(ValueError, match="^azure: "):
        workloads.azure(*arguments)


def test_poisson():
    requests = workloads.orca(3000)
    slow, fast = workloads.poisson(requests, 2.0), workloads.poisson(requests, 4.0)
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in requests]
    gaps = [b.arrival_seconds - a.arrival_seconds for a, b in zip(slow, slow[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.06)
    # An exponential distribution has equal mean and standard deviation.
    assert statistics.pstdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.08)
    assert [r.arrival_seconds for r in fast] == pytest.approx([r.arrival_seconds / 2 for r in slow])
    assert workloads.at_once(slow) == requests
    with pytest.raises(ValueError, match="rate must be above 0"):
        workloads.poisson(requests, 0)


def test_summaries():
    requests = [workloads.Request(0.0, 5, 3), workloads.Request(4.0, 2, 9)]
    assert workloads.longest(requests) == 11
    assert workloads.offered_rate(requests) == 0.5
    assert workloads.offered_rate(workloads.at_once(requests)) is None
