"""The simulation: by hand, compared with the relay itself, and with published formulas."""

import random
from dataclasses import dataclass

import pytest
from bench_package import import_bench

from baton_engines import policies
from baton_engines.llama import patch_llama
from baton_engines.policies import Plan
from baton_engines.testing import FakeLlama
from baton_engines.testing.small_llama import small_llama

workloads = import_bench("workloads")
cases = import_bench("studies.simulate.cases")
costs = import_bench("studies.simulate.costs")
events = import_bench("studies.simulate.events")
system = import_bench("studies.simulate.system")
measured = import_bench("studies.simulate.measured")
validation = import_bench("studies.simulate.validate")

Request = workloads.Request
System = system.System
Work = costs.Work


@dataclass
class Linear:
    """A cost that does not distinguish prefill from decode."""

    base: float = 1.0
    per_token: float = 0.0
    per_row: float = 0.0
    per_column: float = 0.0
    bytes_per_token: int = 1
    copy_seconds: float = 0.0

    def forward(self, work):
        columns = work.decode_columns + work.prefill_columns
        return costs.Cost(
            self.base
            + self.per_token * work.tokens
            + self.per_row * work.rows
            + self.per_column * columns
        )

    def copy(self, num_bytes):
        return self.copy_seconds * num_bytes


def run(policy, requests, num_slots=2, cost=None, options=None, **changes):
    return system.simulate(
        System(
            cost or Linear(), lambda: policies.get(policy, **(options or {})), num_slots, **changes
        ),
        requests,
    )


def random_requests(count, seed, rate=None):
    generator = random.Random(seed)
    requests = [
        Request(0.0, generator.randint(1, 30), generator.randint(1, 12)) for _ in range(count)
    ]
    return requests if rate is None else workloads.poisson(requests, rate, seed=seed)


def test_baton_by_hand():
    # Forwards of 1 second + 0.1 per token. Prefill of a and b: 5 tokens, 1.5 s; one step of two
    # rows, 1.2 s, and b has ended at 2.7. c prefills at 2.7, 4 tokens, 1.4 s, while a waits. Steps
    # of a and c until 5.3, when a has its third token; c has its third after 1.1 s more.
    requests = [Request(0.0, 2, 3), Request(0.0, 3, 2), Request(0.0, 4, 3)]
    result = run("baton", requests, cost=Linear(1.0, 0.1), options={"join": "never"})
    assert result.seconds == pytest.approx(6.4)
    assert result.ttft == pytest.approx([1.5, 1.5, 4.1])
    assert sorted(zip(result.gaps, result.gap_counts, strict=True)) == [
        (pytest.approx(1.1), 1),
        (pytest.approx(1.2), 1),
        (pytest.approx(1.2), 1),
        (pytest.approx(1.2), 1),
        (pytest.approx(2.6), 1),
    ]
    assert (result.steps, result.output_tokens) == (3, 8)
    assert result.slot_idle == pytest.approx(1 / 6)
    assert result.prefill_stall == pytest.approx(1.4 / (2 * 6.4))


def test_orca_by_hand():
    # One forward per iteration: 5 tokens, then 2; then 4 of c's prompt and 1 of a; then 1 of c.
    requests = [Request(0.0, 2, 3), Request(0.0, 3, 2), Request(0.0, 4, 3)]
    result = run("orca", requests, cost=Linear(1.0, 0.1))
    assert result.seconds == pytest.approx(1.5 + 1.2 + 1.5 + 1.1 + 1.1)
    assert result.ttft == pytest.approx([1.5, 1.5, 4.2])
    assert result.prefill_stall == 0
    # The same, but a's single token takes the same number of token slots as c's prompt.
    padded = run("padded_orca", requests, cost=Linear(1.0, 0.1))
    assert padded.seconds == pytest.approx(1.6 + 1.2 + 1.8 + 1.1 + 1.1)
    assert padded.joint_padding == pytest.approx((1 + 3) / (6 + 8))


def test_prefill_apart_by_hand():
    # Prefill of 2 tokens 1.2 s each, one after the other; a transfer of 2 bytes takes 1 s. a enters
    # at 2.2, copied in 0.2 s, so its step ends at 2.2 + 0.2 + 1.1; b has arrived at 3.4 and enters
    # at 3.5: copy and a step of two rows until 4.9.
    requests = [Request(0.0, 2, 3), Request(0.0, 2, 2)]
    result = run(
        "baton",
        requests,
        cost=Linear(1.0, 0.1, copy_seconds=0.1),
        prefill="apart",
        prefillers=1,
        transfer=lambda num_bytes: num_bytes / 2,
        max_prefill_tokens=2,
    )
    assert result.ttft == pytest.approx([1.2, 2.4])
    assert result.seconds == pytest.approx(4.9)
    assert sorted(result.gaps) == pytest.approx(sorted([3.5 - 1.2, 4.9 - 3.5, 4.9 - 2.4]))
    assert result.num_devices == 2
    assert result.tokens_per_device == pytest.approx(5 / 4.9 / 2)


def test_jobs_share_a_device():
    # The first has 6 s of work, the second 3 s from second 2 on. Ideally they slow each other down
    # by 1.25, the sum of the shares of memory bandwidth that they need; so the second ends after
    # 3.75 s, when the first has 6 - 2 - 3 s left.
    for overlap, ends in ((1.0, [5.75, 6.75]), (0.0, [8.0, 9.0])):
        clock = events.Events()
        device = events.SharedDevice(clock, overlap)
        ended = []
        first, second = costs.Cost(6.0, 0.5, 0.75), costs.Cost(3.0, 0.5, 0.5)
        device.start(first, lambda: ended.append(clock.now))  # noqa: B023
        clock.at(2.0, lambda: device.start(second, lambda: ended.append(clock.now)))  # noqa: B023
        clock.run()
        assert ended == pytest.approx(ends)
        assert device.busy_seconds == pytest.approx(ends[-1])


class TimedLlama(FakeLlama):
    """Its forwards take simulated seconds."""

    def __init__(self, cost):
        super().__init__()
        self.cost, self.now = cost, 0.0

    def forward(self, token_ids, batch, cache, *, logits="last", float32=True):
        result = super().forward(token_ids, batch, cache, logits=logits)
        counts = [sum(both) for both in zip(batch.query_lengths, batch.padding, strict=True)]
        columns = sum(batch.total_lengths) + sum(batch.padding)
        work = Work(tokens=sum(counts), rows=batch.num_rows, prefill_columns=columns)
        self.now += self.cost.forward(work).seconds
        return result


POLICIES = [
    ("baton", {}),
    ("baton", {"max_token_gap": 2.0}),
    ("baton", {"join": "never"}),
    ("baton", {"join": "never", "max_stall_tokens": 7, "admission": "shortest"}),
    ("chunked", {"token_budget": 9}),
    ("multi_bin", {"bins": 3}),
    ("orca", {}),
    ("padded_orca", {}),
    ("run_to_completion", {}),
]


@pytest.mark.parametrize("rate", [None, 0.3, 1.0])
@pytest.mark.parametrize("policy, options", POLICIES)
def test_it_does_what_the_relay_does(policy, options, rate):
    """Every token comes at the same second as in the relay, on a clock that its forwards
    advance."""
    requests = random_requests(40, 3, rate)
    cost = Linear(0.5, 0.125, 0.0625, 0.0078125)
    model = TimedLlama(cost)
    clock = validation.SkippingClock(lambda: model.now)
    real = validation.measure(model, policies.get(policy, **options), requests, 4, clock)
    ours = run(policy, requests, 4, cost, options)
    assert ours.tokens_per_second == pytest.approx(real.tokens_per_second, rel=1e-9)
    assert ours.steps == real.steps
    assert ours.slot_idle == pytest.approx(real.slot_idle)
    assert ours.prefill_stall == pytest.approx(real.prefill_stall)
    assert ours.ttft == pytest.approx(real.ttft)
    gaps = [gap for gap, n in zip(ours.gaps, ours.gap_counts, strict=True) for _ in range(n)]
    assert sorted(gaps) == pytest.approx(sorted(real.gaps))
    assert ours.gap_percentile(99) == pytest.approx(real.gap_percentile(99))


@pytest.mark.parametrize("prefill, prefillers", [("serial", 0), ("overlapped", 0), ("apart", 2)])
@pytest.mark.parametrize("policy, options", POLICIES)
def test_every_token_is_generated_once(policy, options, prefill, prefillers):
    requests = random_requests(60, 5, 2.0)
    for decoders in (1, 3):
        result = run(
            policy, requests, 4, Linear(0.5, 0.01), options,
            prefill=prefill, prefillers=prefillers, decoders=decoders, transfer=lambda n: 0.01 * n,
        )  # fmt: skip
        assert result.output_tokens == sum(request.output_tokens for request in requests)
        # Every token but a query's first comes after another one.
        assert sum(result.gap_counts) == result.output_tokens - len(requests)
        assert min(result.ttft) > 0 and min(result.gaps) > 0
        assert 0 <= result.slot_idle < 1 and result.busy <= 1 + 1e-9
        assert result.num_devices == decoders + prefillers


def test_a_run_repeats_itself():
    cost = costs.roofline("A100-80G", "llama-7b")
    requests = workloads.poisson(workloads.orca(60), 5.0)
    first, second = (
        run("baton", requests, 8, cost, prefill="overlapped", decoders=2) for _ in range(2)
    )
    assert first.seconds == second.seconds
    assert first.gaps.tobytes() == second.gaps.tobytes()
    assert first.ttft.tobytes() == second.ttft.tobytes()


@pytest.mark.parametrize("num_slots, loss", [(8, 1.77), (16, 1.88), (32, 1.94)])
def test_what_run_to_completion_loses(num_slots, loss):
    """For outputs U(1, 128), counting slots only: 1 / (1 - slot idle)."""
    outputs = [*range(1, 129)] * 38
    random.Random(1).shuffle(outputs)
    # One token more, because the first one comes from the prefill.
    requests = [Request(0.0, 1, output + 1) for output in outputs]
    result = run("run_to_completion", requests, num_slots)
    # Two standard errors of the mean of the batches' longest.
    assert 1 / (1 - result.slot_idle) == pytest.approx(loss, abs=0.016)


@pytest.mark.parametrize("bins", [1, 2, 4, 8])
def test_multi_bin_throughput(bins):
    """`c_k` of the paper, for service times uniform in [a, b]; here these are steps, one per
    token."""
    low, high, size, count = 40, 200, 8, 1600
    generator = random.Random(2)
    width = (high - low) // bins
    # The same number in every bin, so that no batch is left over that is not full.
    outputs = [low + i % bins * width + generator.randrange(width) + 1 for i in range(count)]
    generator.shuffle(outputs)
    requests = [Request(0.0, 1, output) for output in outputs]
    edges = [low + 1 + i * width for i in range(1, bins)]
    # The prefill costs next to nothing, so a query's time is that of its steps.
    cost = Linear()
    cost.forward = lambda work: costs.Cost(1.0 if work.decode_rows else 1e-9)
    result = run("multi_bin", requests, size, cost, {"bins": bins, "edges": edges})
    # Integers from a to b - 1 have the moments of a uniform distribution half a step lower.
    mean = (low + high) / 2 - 0.5
    expected = size / (mean + (size - 1) / (size + 1) * (high - low) / (2 * bins))
    assert result.queries / result.seconds == pytest.approx(expected, rel=0.015)


def test_budget_is_never_exceeded():
    requests = random_requests(50, 7)
    for policy, options in POLICIES:
        free = run(policy, requests, 6, Linear(), options)
        bound = run(policy, requests, 6, Linear(), options, kv_budget=60)
        assert free.most_bytes > 60 >= bound.most_bytes
        assert bound.output_tokens == free.output_tokens
        assert bound.preemptions >= free.preemptions == 0


def test_shaping_is_charged():
    requests = random_requests(40, 8)
    cost = Linear(1.0, 0.0, 0.0, 0.01, copy_seconds=1e-3)
    ragged, dense, copied = (
        run("baton", requests, 4, cost, {"join": "never"}, shape=shape)
        for shape in ("ragged", "dense", "concatenated")
    )
    assert ragged.cache_padding_read == ragged.copied_bytes == 0
    assert 0.2 < dense.cache_padding_read == copied.cache_padding_read < 0.6
    assert ragged.seconds < dense.seconds < copied.seconds
    assert copied.copied_bytes > 0


def test_roofline_by_hand():
    device = costs.Device("d", flops=1e12, bandwidth=1e11, memory=1e9, link=1e9, link_name="l")
    model = costs.Model("m", layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocab=100)
    # q and o 64 x 64, k and v 64 x 32, three of 64 x 128.
    assert model.layer_parameters == 2 * (2 * 4096 + 2 * 2048 + 3 * 8192)
    assert model.bytes_per_token == 2 * 2 * 2 * 2 * 16
    one = costs.Roofline(device, model, compute_share=0.5, memory_share=0.5, launch_seconds=1e-6)
    weights, head, kv = 73728, 6400, 256
    decode = one.forward(Work(tokens=4, rows=4, decode_rows=4, decode_columns=1000))
    expected = (2 * (weights + head) + 4 * kv + 1000 * kv) / 5e10 + 16e-6
    assert decode.seconds == pytest.approx(expected)
    assert decode.memory == pytest.approx(1 - 16e-6 / expected)
    prefill = one.forward(Work(tokens=5000, rows=1, prefill_columns=5000, pairs=12502500))
    expected = (2 * (weights * 5000 + head) + 4 * 2 * 64 * 12502500) / 5e11 + 16e-6
    assert prefill.seconds == pytest.approx(expected)
    assert one.copy(5e10) == pytest.approx(2.0)
    per_row = costs.Roofline(device, model, kernels_per_row=3)
    apart = per_row.forward(Work(tokens=4, rows=4)).seconds
    assert apart - costs.Roofline(device, model).forward(Work(4, 4)).seconds == pytest.approx(
        2 * 3 * 4 * 4e-6
    )


def test_published_sizes():
    for name, billions in (("llama-7b", 6.74), ("llama-13b", 13.02), ("llama-70b", 68.98)):
        assert costs.MODELS[name].weight_bytes / 2e9 == pytest.approx(billions, abs=0.01)
    assert costs.MODELS["llama-7b"].bytes_per_token == 512 * 1024
    assert costs.roofline("A100-80G", "llama-7b").parallel == 1
    assert costs.roofline("H100", "llama-70b").parallel == 4
    with pytest.raises(ValueError, match="device must be one of T4, A100-80G, H100, got 'B200'"):
        costs.roofline("B200", "llama-7b")


def test_fit_finds_the_coefficients():
    true = measured.Measured(
        measured.KNOTS,
        tuple(0.04 + 0.002 * knot for knot in measured.KNOTS),
        1e-3,
        2e-6,
        1e-6,
        1e10,
        100,
    )
    rows = measured.calibration_rows(16, 300)
    samples = [
        measured.Sample(work, true.forward(work).seconds) for work in map(measured.work_of, rows)
    ]
    found = measured.fit(samples, copy_bandwidth=1e10, bytes_per_token=100)
    assert found.error < 1e-6
    work = Work(tokens=700, rows=5, decode_rows=4, decode_columns=900, pairs=70000)
    assert found.forward(work).seconds == pytest.approx(true.forward(work).seconds, rel=1e-3)


class Plans(policies.Policy):
    """Returns the same plan every time."""

    name = "plans"

    def __init__(self, said):
        self.said = said

    def plan(self, view):
        return self.said(view) if callable(self.said) else self.said


def test_bad_systems():
    requests = [Request(0.0, 1, 2)]
    good = {"cost": Linear(), "policy": lambda: policies.get("baton"), "num_slots": 2}
    for changes, text in (
        ({"prefill": "beside"}, "prefill must be one of serial, overlapped, apart, got 'beside'"),
        ({"prefill": "apart"}, "prefillers must be above 0 for prefill apart"),
        ({"prefillers": 1}, "prefillers must be above 0 for prefill apart and 0 otherwise, got 1"),
        ({"shape": "square"}, "shape must be one of ragged, dense, concatenated, got 'square'"),
        ({"overlap": 2.0}, "overlap must be from 0 to 1, got 2.0"),
        ({"kv_budget": 1}, "kv_budget must hold every query, the longest takes 2 bytes, got 1"),
        ({"policy": lambda: Plans(Plan())}, "must admit up to 2 queries, and one when nothing"),
        (
            {"policy": lambda: Plans(lambda view: Plan(admit=tuple(view.waiting)))},
            "must lead to a forward",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            system.simulate(System(**{**good, **changes}), requests)


def test_goodput_is_the_highest_rate_within_bounds(monkeypatch):
    monkeypatch.setattr(cases, "REQUESTS", 60)
    case = cases.Case("orca", 8)
    sought = cases.Goodput(case, ttft=1.0, gap=0.06)
    rate = cases.run_goodput(sought)
    assert rate > 0 and sought.holds(rate) and not sought.holds(1.03 * rate)
    assert cases.run_goodput(cases.Goodput(case, ttft=1.0, gap=1e-6)) == 0


def test_results_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(cases, "REQUESTS", 30)
    made = [cases.Case("baton", slots, workload="conv", rate=9.0) for slots in (2, 4, 4, 8)]
    one, two = cases.run_all(made, 1), cases.run_all(made, 2)
    assert list(one) == list(two) == [made[0], made[1], made[3]]
    for case in one:
        assert one[case].seconds == two[case].seconds
        assert one[case].ttft.tobytes() == two[case].ttft.tobytes()


def test_the_study_prints_and_draws(monkeypatch, tmp_path, capsys):
    study = import_bench("studies.simulate.study")
    monkeypatch.setattr(cases, "REQUESTS", 4)
    # The searches have a separate test.
    monkeypatch.setattr(cases, "run_goodput", lambda sought: 1.0)
    results = study.run_study(processes=1, figures=tmp_path)
    printed = capsys.readouterr().out
    for section in range(1, 8):
        assert f"\n{section}. " in printed
    claim = study.claims(16)[2]
    plain = results[claim.ours].seconds, results[claim.theirs].seconds
    assert claim.ratio(results) == pytest.approx(plain[1] / plain[0])
    assert f"{claim.text:<82}{claim.ratio(results):>6.2f}" in printed
    # Counting the prefill device halves the result of a free one.
    charged, free = (claim for claim in study.claims(16) if claim.text.startswith("apart, prefill"))
    assert free.ratio(results) == pytest.approx(2 * charged.ratio(results))
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(drawn) == 3 and all(data.startswith(b"\x89PNG") for data in drawn.values())


def test_validation_of_a_small_model(capsys):
    model = small_llama(vocab_size=100, max_position_embeddings=256, eos_token_id=None)
    with patch_llama(model) as patched:
        cost, samples = measured.calibrate(patched, max_rows=2, max_length=160, repeats=1)
        assert all(sample.seconds > 0 for sample in samples)
        made = validation.validate(
            patched, cost, count=3, num_slots=2, report=validation.print_case
        )
    validation.print_summary(made)
    printed = capsys.readouterr().out
    assert [case.policy for case in made] == 2 * list(policies.NAMES)
    for case in made:
        assert case.predicted.output_tokens == sum(
            r.output_tokens for r in workloads.orca(3, divisor=4)
        )
        assert case.measured.tokens_per_second > 0 and case.drift > 0
        if case.workload == "at once":
            assert case.predicted.steps == case.measured.steps
    assert printed.count("\n") == len(made) + 6 and "baton / orca" in printed
