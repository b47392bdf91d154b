"""The evaluation on a tiny random Llama: its gate, its limit, its figures, tables and report."""

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_package import import_bench
from turns import made_once

from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama
from baton_engines.testing.small_llama import small_llama

cells, engines, figures, limit, matrix, measure, peers, run, summary, systems, tables, evaluate = (
    import_bench(f"evaluation.{name}")
    for name in (
        "cells", "engines", "figures", "limit", "matrix", "measure", "peers", "run", "summary",
        "systems", "tables", "evaluate",
    )
)  # fmt: skip
relay_command = import_bench("relay")
Request = import_bench("workloads").Request

CEILING = limit.Ceiling(flops=1e9, read_bytes=1e8)
# Every system except the one whose process takes seconds to start; that one is tested in
# tests/relay/test_prefill_apart.py.
RELAYS = tuple(name for name in systems.SYSTEMS if name != "baton_apart")
TINY = cells.Cell(
    "orca", slots=4, queries=9, divisor=16, repeats=2, timeline=True, peers=True, systems=RELAYS
)


@pytest.fixture(scope="module")
def model():
    return small_llama(
        vocab_size=200, max_position_embeddings=256, bos_token_id=None, eos_token_id=3,
        attn_implementation="sdpa",
    )  # fmt: skip


@pytest.fixture
def session(model):
    sizes = limit.Sizes.of(model.config, torch.float32)
    stream = torch.randint(4, 200, (499,), generator=torch.Generator().manual_seed(0)).tolist()
    with (
        evaluate.quiet_transformers(),
        measure.Session(model, stream, sizes, report=lambda line: None) as session,
    ):
        yield session


@pytest.fixture(scope="module")
def results(request, model):
    """A whole run on the tiny model, as a command reads it; one for all processes."""

    def run(folder):
        (folder / "results.json").write_text(json.dumps(whole_run(model)))

    return json.loads((made_once(request, "evaluation", run) / "results.json").read_text())


def whole_run(model):
    """The results of `evaluate`."""
    stream = torch.randint(4, 200, (499,), generator=torch.Generator().manual_seed(0)).tolist()
    absent = replace(engines.ENGINES["vllm"], environment="no-such-environment")
    poisson = replace(
        TINY, arrivals="poisson", group="rates", repeats=1, peers=False, timeline=False,
        systems=("run_to_completion", "baton"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load", lambda name, dtype, device: (model, stream))
        patch.setattr(evaluate, "measure_ceiling", lambda dtype, repeats=5, device="cpu": CEILING)
        patch.setitem(engines.ENGINES, "vllm", absent)
        return evaluate.evaluate(
            [TINY, replace(poisson, load=0.5), replace(poisson, rate=500.0)],
            engines=["vllm"],
            report=lambda line: None,
        )


def test_work_by_hand():
    sizes = limit.Sizes(
        token_flops=100.0, logits_flops=10.0, pair_flops=1.0, weight_bytes=1000.0, kv_bytes=2.0
    )
    requests = [Request(0.0, 3, 3), Request(0.0, 2, 1)]
    # Prefills: 3 x 100 + (1 + 2 + 3) + 10 and 2 x 100 + (1 + 2) + 10. Decode: two tokens after a
    # prompt of 3 attend to 4 and 5 tokens.
    prefill, arithmetic = 316 + 213, 2 * 110 + 9
    fast_memory = limit.Ceiling(flops=1.0, read_bytes=1e9)
    assert limit.work_seconds(requests, sizes, fast_memory, slots=4) == prefill + arithmetic
    # Two steps read all weights, and both read the same tokens' keys and values.
    fast_cores = limit.Ceiling(flops=1e9, read_bytes=1.0)
    reading = 2 * 1000 + 9 * 2
    assert limit.work_seconds(requests, sizes, fast_cores, slots=4) == pytest.approx(reading)
    assert limit.work_seconds(requests, sizes, fast_cores, 4, steps=5) == pytest.approx(5018)


def test_no_limit_before_the_arrival():
    sizes = limit.Sizes(1.0, 0.0, 0.0, 0.0, 0.0)
    ceiling = limit.Ceiling(1.0, 1.0)
    requests = [Request(0.0, 4, 1), Request(1.0, 4, 1), Request(50.0, 2, 1)]
    assert limit.limit_seconds(requests, sizes, ceiling, 2) == 52
    assert limit.limit_seconds(requests[:2], sizes, ceiling, 2) == 8


def test_sizes_are_the_model_s(model):
    sizes = limit.Sizes.of(model.config, torch.float32)
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "norm" not in name and "embed" not in name and "bias" not in name
    )
    assert sizes.weight_bytes == 4 * weights
    cache = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
    assert sizes.kv_bytes == 4 * cache * model.model.layers[0].self_attn.head_dim


def test_latencies_by_hand():
    requests = [Request(0.0, 1, 3), Request(2.0, 1, 1)]
    figures = run.latencies(requests, [[1.0, 2.0, 4.0], [5.0]])
    assert figures["ttft_p50"] == 2.0
    assert figures["time_per_token_p50"] == 1.5
    # 4 seconds for 3 tokens, and 3 for one.
    assert figures["normalized_latency_p50"] == pytest.approx((4 / 3 + 3) / 2)
    assert run.latencies(requests[1:], [[5.0]])["time_per_token_p99"] is None


def test_prompts_have_their_lengths_and_differ():
    jobs = run.make_jobs([Request(0.0, n, 1) for n in (5, 700, 5)], list(range(499)))
    assert [len(job.token_ids) for job in jobs] == [5, 700, 5]
    assert jobs[0].token_ids != jobs[2].token_ids
    assert jobs[1].token_ids[499:] == jobs[1].token_ids[:201]


def test_agreement_by_hand():
    counts = measure.agreement([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5]])
    assert counts == {"equal_queries": 1, "queries": 2, "equal_tokens": 4 / 5}


def test_queries_are_submitted_when_they_arrive():
    now = [0.0]

    def clock():
        now[0] += 0.01
        return now[0]

    def sleep(seconds):
        assert seconds >= 0
        now[0] += seconds

    requests = [Request(0.0, 3, 4), Request(0.3, 2, 3), Request(40.0, 5, 2), Request(40.0, 1, 2)]
    done = run.run_relay(
        lambda: Relay(FakeLlama(), 2, 16, clock=clock),
        run.make_jobs(requests, range(4, 40)),
        clock=clock,
        sleep=sleep,
    )
    assert [len(answer) for answer in done.tokens] == [4, 3, 2, 2]
    assert 40 < done.figures["seconds"] < 41
    assert done.figures["ttft_p99"] < 1
    assert {span[1] for span in done.spans} == {0, 1, 2, 3}


def test_idle_counts_only_steps_with_queries_waiting():
    # A static batch of two: the second row is empty for 8 of 9 steps while the third query waits.
    requests = [Request(0.0, 1, 10), Request(0.0, 1, 2), Request(0.0, 1, 2)]
    static = run.run_relay(
        lambda: Relay(FakeLlama(), 2, 16, policy="run_to_completion"),
        run.make_jobs(requests, range(4, 40)),
    )
    # The first step's row of the second query counts as busy.
    assert static.figures["slot_idle_loaded"] == pytest.approx(8 / 18)
    assert static.figures["rows_per_step"] == pytest.approx(11 / 10)


def test_every_system_gives_the_same_answers(results):
    cell = results["cells"][0]
    assert set(cell["systems"]) == {*RELAYS, *peers.PEERS}
    for name, system in cell["systems"].items():
        assert system["agreement"]["equal_queries"] == 9, name
        assert len(system["runs"]) == (2 if system["kind"] == "relay" else 1)
    assert cell["failed"] == {
        "vllm": "not installed: `make bench-engines` makes no-such-environment"
    }


def test_figures_of_the_policies(results):
    runs = {name: system["runs"][0] for name, system in results["cells"][0]["systems"].items()}
    assert runs["baton"]["shaping_bytes"] == runs["baton"]["cache_padding_read"] == 0
    assert 0 < runs["baton_aligned"]["shaping_bytes"] < runs["baton_concat"]["shaping_bytes"]
    assert runs["padded_orca"]["joint_padding"] > 0 == runs["orca"]["joint_padding"]
    assert runs["run_to_completion"]["slot_idle_loaded"] > runs["baton"]["slot_idle_loaded"]
    assert runs["orca"]["prefill_stall"] == runs["baton"]["prefill_stall"] == 0
    assert runs["baton_never"]["prefill_stall"] > 0 < runs["baton"]["joint_share"]
    for figures in runs.values():
        assert figures["output_tokens_per_second"] > 0


def test_gate(session, monkeypatch):
    honest = measure.run_relay

    def wrong(make, jobs):
        done = honest(make, jobs)
        if make().policy.name == "orca":
            done.tokens[3][-1] ^= 1
        return done

    monkeypatch.setattr(measure, "run_relay", wrong)
    cell = replace(TINY, repeats=1, peers=False, systems=("orca", "baton"))
    with pytest.raises(measure.GateError, match="answers of orca must be those of baton, got 8"):
        session.measure(cell, CEILING)
    # bfloat16 answers may differ; the number of different ones is reported.
    told = session.measure(replace(cell, dtype="bfloat16"), CEILING)
    assert told["systems"]["orca"]["agreement"]["equal_queries"] == 8


def test_wrong_answers_get_no_figure(monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise measure.GateError("bench: answers differ")

    monkeypatch.setattr(evaluate, "evaluate", refuse)
    assert relay_command.main(["--quick", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no figure is given" in printed.err
    assert not printed.out and not list(tmp_path.iterdir())


def test_peer_that_fails_loses_nothing(session, monkeypatch):
    def broken(*_):
        raise RuntimeError("not on this machine")

    monkeypatch.setitem(peers.PEERS, "transformers_static", peers.Peer(broken, "broken"))
    cell = session.measure(replace(TINY, repeats=1, systems=("baton",)), CEILING)
    assert cell["failed"] == {"transformers_static": "not on this machine"}
    assert set(cell["systems"]) == {"baton", "transformers_continuous"}
    assert "not on this machine" in tables.sheets(cell)[0].rows[-1][0]


def test_tables_hold_the_figures(results):
    text = tables.markdown(results)
    rates = results["cells"][0]["systems"]["baton"]["runs"]
    middle = sorted(figures["output_tokens_per_second"] for figures in rates)
    assert f"| baton | {sum(middle) / 2:,.1f} ({middle[0]:,.1f}-{middle[1]:,.1f}) |" in text
    for cell in results["cells"]:
        for sheet in tables.sheets(cell):
            assert {len(row) for row in sheet.rows} == {len(sheet.headings)}
    assert results["machine"] in text


def test_ratios_are_taken_run_by_run():
    runs = {"orca": [{"x": 1.0}, {"x": 4.0}], "baton": [{"x": 2.0}, {"x": 4.0}], "p": [{"x": 5.0}]}
    by = summary.ratios(runs, "orca", "x")
    assert by["baton"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert by["p"]["median"] == 2.0


def test_pictures_are_drawn(results, tmp_path):
    paths = figures.write(results, tmp_path / "new")
    assert {path.name for path in paths} == {
        "throughput.png", "slot_time.png", "load.png", "all_cells.png", "timelines.png",
    }  # fmt: skip
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_slot_time_adds_up(results):
    cell = results["cells"][0]
    for name in RELAYS:
        shares = figures.slot_time(cell["systems"][name], cell["slots"])
        assert sum(shares.values()) == pytest.approx(1)
        assert all(value >= 0 for value in shares.values())
    assert figures.slot_time(cell["systems"]["orca"], 4)["stall"] == 0
    assert figures.slot_time(cell["systems"]["baton_never"], 4)["joint"] == 0


def test_command_reads_an_earlier_run(results, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert relay_command.main(["--output", str(tmp_path), "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == tables.markdown(json.loads(json.dumps(results)))
    source = str(tmp_path / "results.json")
    assert relay_command.main(["--from", source, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "throughput.png").stat().st_size > 5_000
    assert "output tokens/s" in capsys.readouterr().out


def test_command_fills_a_document(results, tmp_path):
    source, page = tmp_path / "results.json", tmp_path / "tables.md"
    source.write_text(json.dumps(results))
    document = Path(__file__).resolve().parents[2] / "docs" / "evaluation" / "tables.md"
    page.write_text(document.read_text())
    command = ["--from", str(source), "--output", str(tmp_path / "out"), "--fill", str(page)]
    assert relay_command.main([*command, "--markdown"]) == 0
    before, _, after = document.read_text().partition("<!-- policies -->\n")
    text = tables.markdown(json.loads(json.dumps(results))).strip()
    after = after[after.index("<!-- /policies -->") :]
    assert page.read_text() == f"{before}<!-- policies -->\n{text}\n{after}"
    assert relay_command.main([*command, "--markdown", "--engines"]) == 0
    assert page.read_text().count(text) == 2


def parse(*arguments):
    parser = relay_command.argparse.ArgumentParser()
    matrix.add_arguments(parser)
    return matrix.select(parser.parse_args(arguments))


def test_default_cells_cover_what_is_promised():
    chosen = parse()
    assert {cell.workload for cell in chosen} == set(cells.WORKLOADS)
    assert {cell.model for cell in chosen} == set(cells.MODELS)
    assert {cell.dtype for cell in chosen} == set(cells.DTYPES)
    assert {cell.slots for cell in chosen} == {4, 8, 16, 32}
    assert {cell.arrivals for cell in chosen} == set(cells.ARRIVALS)
    assert len([cell for cell in chosen if cell.group == "rates"]) >= 3
    assert chosen[0].systems == () and chosen[0].peers


def test_cells_can_be_selected():
    chosen = parse("--slots", "4", "8", "--dtypes", "bfloat16", "--rates", "2", "--queries", "5")
    assert [(cell.slots, cell.dtype, cell.rate) for cell in chosen] == [
        (4, "bfloat16", 2.0), (8, "bfloat16", 2.0)
    ]  # fmt: skip
    assert all(cell.queries == 5 and not cell.peers for cell in chosen)
    assert "at 2.00/s" in chosen[0].title
    assert all(cell.systems == ("baton",) for cell in parse("--quick", "--systems", "baton"))


def test_trace_is_compressed_to_the_load():
    cell = replace(TINY, workload="code", arrivals="trace", load=0.5, queries=40)
    requests = cell.requests(saturated=8.0)
    assert len(requests) / requests[-1].arrival_seconds == pytest.approx(4.0)
    assert [r.output_tokens for r in requests] == [r.output_tokens for r in cell.at_once()]


WORKER = """
from protocol import Clocked, serve

def start(work):
    print("an engine may print what it likes")
    def run(jobs):
        result = Clocked(len(jobs))
        for index, (ids, count) in enumerate(jobs):
            result.add(index, [7])
            result.add(index, [7] * (count - 1))
        return result
    return {"versions": {"fake": "1"}}, run

serve(start)
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Returns an engine whose worker is the given program."""

    def make(program):
        (tmp_path / "protocol.py").write_text((engines.WORKERS / "protocol.py").read_text())
        (tmp_path / "fake_worker.py").write_text(program)
        monkeypatch.setattr(engines, "WORKERS", tmp_path)
        python = Path(sys.executable)
        return SimpleNamespace(
            name="fake", python=python, model_folder=lambda: tmp_path, options={}, variables={}
        )

    return make


def test_engine_in_a_process_of_its_own(engine):
    jobs = run.make_jobs([Request(0.0, 3, 4), Request(0.0, 2, 1)], range(9))
    process = engines.EngineProcess(engine(WORKER), jobs, "float32", 2)
    assert process.about == {"versions": {"fake": "1"}}
    for _ in range(2):
        done = process.run()
        assert done.tokens == [[7] * 4, [7]]
        assert 0 < done.figures["seconds"] < 10
    part = process.run(1, 2)
    assert part.tokens == [[7]]
    assert part.figures["queries_per_second"] == pytest.approx(1 / part.figures["seconds"])
    process.close()


def test_engine_that_does_not_come_up_says_why(engine):
    jobs = run.make_jobs([Request(0.0, 3, 4)], range(9))
    with pytest.raises(RuntimeError, match="no such instruction"):
        engines.EngineProcess(engine("raise OSError('no such instruction')"), jobs, "float32", 2)


@pytest.mark.parametrize("name", ["page_size", "block_size"])
def test_continuous_batching_is_configured_for_every_release(monkeypatch, name):
    import transformers

    seen = {}

    class Config:
        def __init__(self, **options):
            seen.update(options)

    parameters = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in (name, "num_blocks")
    ]
    Config.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr(transformers, "ContinuousBatchingConfig", Config)
    peers._batching_config(64, num_blocks=3, use_cuda_graph=False)
    assert seen == {name: 64, "num_blocks": 3}
