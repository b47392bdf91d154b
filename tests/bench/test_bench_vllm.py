"""`bench.vllm` with engines that answer at once: what is served, compared and printed."""

import pytest
from bench_package import import_bench

vllm = import_bench("vllm")
Run = import_bench("evaluation.run").Run


class Engine:
    """Stands in for a process: answers are the first tokens of the prompts."""

    speed = {vllm.THEIRS: 100.0, vllm.OURS: 140.0, vllm.INVARIANT: 133.0}

    def __init__(self, engine, jobs, dtype, slots):
        (self.name,) = [name for name, known in vllm.BACKENDS.items() if known is engine]
        self.jobs, self.served, self.closed = jobs, [], False
        ours = self.name != vllm.THEIRS
        self.about = {"attention": ["baton_engines.vllm.backend" if ours else "theirs"]}
        self.wrong = None
        ENGINES.append(self)

    def run(self, begin, end):
        self.served.append((begin, end))
        tokens = [[job.token_ids[0]] * job.request.output_tokens for job in self.jobs[begin:end]]
        if self.wrong == len(self.served):
            tokens[-1][-1] += 1
        # Later turns are faster for everyone.
        speed = self.speed[self.name] * len(self.served)
        figures = dict.fromkeys(vllm.FIGURES.values(), 0.5)
        figures |= {"output_tokens_per_second": speed, "seconds": 2.0, "attention_seconds": 0.5}
        return Run(tokens, figures)

    def close(self):
        self.closed = True


ENGINES: list[Engine] = []


@pytest.fixture(autouse=True)
def _engines(monkeypatch):
    ENGINES.clear()
    monkeypatch.setattr(vllm, "EngineProcess", Engine)
    monkeypatch.setattr(vllm, "make_entry_points", lambda folder: None)


def test_all_workloads_in_turns_by_engines_that_start_once(capsys):
    assert vllm.main(["--quick", "--turns", "3"]) == 0
    assert {engine.name for engine in ENGINES} == set(vllm.BACKENDS) and len(ENGINES) == 3
    assert all(engine.closed for engine in ENGINES)
    first, *rest = (engine.served for engine in ENGINES)
    assert rest == [first, first]
    # Three turns with new prompts each, or one to fill the cache and three with the same prompts.
    assert [begin // 8 for begin, _ in first] == [
        0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10,
    ]  # fmt: skip
    assert all(end - begin == 8 for begin, end in first)
    beginnings = [job.token_ids[0] for job in ENGINES[0].jobs]
    assert len(set(beginnings)) == len(beginnings)
    printed = capsys.readouterr().out
    assert printed.count("Ours: 1.40 of vLLM's tokens/s; goal >= 1.3: met.") == 3
    assert printed.count("Ours: 1.40 of vLLM's tokens/s; goal >= 0.97: met.") == 2
    assert printed.count("Batch invariance costs 5.0 % of ours; goal <= 3 %: missed.") == 5
    assert printed.count("Attention that takes no time would make it 1.33.") == 5
    # The median of the counted turns: of 5 to 7 in the second workload, which has one more.
    rows = [line for line in printed.splitlines() if line.startswith("| vLLM's |")]
    assert [row.split("|")[2].strip() for row in rows] == [
        "200.0",
        "600.0",
        "900.0",
        "1200.0",
        "1600.0",
    ]
    assert all(row.split("|")[7].strip() == "25.0 %" for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_figure_where_answers_differ(monkeypatch, capsys, dtype):
    def make(*arguments):
        engine = Engine(*arguments)
        if engine.name == vllm.OURS:
            engine.wrong = 2
        return engine

    monkeypatch.setattr(vllm, "EngineProcess", make)
    assert vllm.main(["--quick", "--dtype", dtype]) == 1
    printed = capsys.readouterr()
    assert "decode, long: 1 of 8 answers differ; no figure is given" in printed.err
    assert "tokens/s" not in printed.out
    # In bfloat16 nothing is measured before a comparison in float32.
    assert len(ENGINES) == (3 if dtype == "float32" else 2)
    assert all(engine.closed for engine in ENGINES)


def test_the_wrong_attention_is_an_error(monkeypatch):
    def make(*arguments):
        engine = Engine(*arguments)
        engine.about = {"attention": ["vllm.v1.attention.backends.cpu_attn"]}
        return engine

    monkeypatch.setattr(vllm, "EngineProcess", make)
    with pytest.raises(RuntimeError, match="^bench.vllm: attention of ours must not be"):
        vllm.main(["--quick"])
    assert all(engine.closed for engine in ENGINES)
