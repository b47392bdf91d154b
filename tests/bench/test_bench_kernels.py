"""The kernel benchmark at tiny sizes: its gate, its arithmetic, its record and its pictures."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from bench_package import import_bench

CASES = (
    "ceilings", "decode", "padding", "paged", "prefix", "eight_bit", "scaling", "prefill", "chunk",
    "mixed", "insert", "extract", "move", "append", "layers", "rows", "linear", "packed",
    "overhead", "step",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """Returns a module of bench.kernels by its name."""
    return lambda name: import_bench(f"kernels.{name}")


@pytest.fixture(scope="module")
def main(modules):
    return modules("__main__")


@pytest.fixture(scope="module")
def options(main, modules):
    """Those of `--tiny`, without vLLM, whose separate environment may or may not exist."""
    made = main.make_options(main.arguments(["--tiny", "--dtype", "float32"]))
    made.vllm = modules("vllm_peer").Vllm(Path("nowhere"))
    return made


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def test_cases_are_all_here(main):
    assert tuple(main.CASES) == CASES


def is_expected(row):
    """Our rows must be right. How accurate a peer is depends on the CPU; the gate may reject
    one."""
    without = ("missing: ", "refused: ") if row.kind == "peer" else ("missing: ",)
    return row.note == "" or row.note.startswith(without)


@pytest.mark.parametrize("case", CASES)
def test_case_runs(main, options, case):
    rows, lines = main.run_case(case, options)
    names = main.CASES[case].ceilings
    assert all(row.case == case for row in rows)
    # Each ceiling has its line, and each summary reports something.
    assert len(lines) >= len(names)
    for row in rows:
        assert is_expected(row)
        assert (row.median_us is None) == bool(row.note)
        if row.median_us:
            assert 0 < row.p10_us <= row.median_us <= row.p90_us
        if row.rate and row.ceiling:
            assert row.share > 0
    if case != "ceilings":
        works = {(row.work, row.threads) for row in rows}
        mine = {(row.work, row.threads) for row in rows if row.kind == "ours" and row.median_us}
        assert works == mine


def wrong_attention(options, modules, monkeypatch, attend):
    """The rows of the decode case with `attend` in place of ragged_attention."""
    cases = modules("attention_cases")
    monkeypatch.setattr(cases, "ragged_attention", attend)
    work = next(cases.decode(options))
    return modules("measure").measure("decode", work, options.effort, options.device.clock, 1)


@pytest.mark.parametrize("fault", ["scaled", "NaN", "one row", "last column left out"])
def test_gate_refuses_a_wrong_op(options, modules, monkeypatch, fault):
    from baton_kernels import ragged_attention

    def attend(query, keys, values, cu_seqlens, slots, starts, lengths, **bounds):
        if fault == "last column left out":
            lengths = lengths - (lengths > 1).int()
        out = ragged_attention(query, keys, values, cu_seqlens, slots, starts, lengths, **bounds)
        if fault == "scaled":
            out = out * 1.0001
        elif fault == "NaN":
            out[0, 0, 0] = float("nan")
        elif fault == "one row":
            out[-1] = out[0]
        return out

    rows = wrong_attention(options, modules, monkeypatch, attend)
    mine = [row for row in rows if row.kind == "ours"]
    # In small pages and in huge ones.
    assert [row.note.split(":")[0] for row in mine] == ["refused", "refused"]
    assert mine[0].median_us is mine[1].median_us is None
    # There is nothing to compare with: peers have times, but no ratio.
    assert any(row.median_us for row in rows)
    assert all(row.ratio is None for row in rows)


def test_gate_refuses_an_op_that_reads_padding(options, modules):
    from baton_kernels import ragged_attention

    heads = modules("attention_work").Heads(4, 2, 16)
    work = modules("attention_work").AttentionWork(
        heads, [1, 1], [3, 9], dtype=torch.float32, device=options.device
    )
    work.poison_padding()
    starts, lengths = work.index[1], work.index[2]
    call = (work.query, *work.cache.layer(0), work.cu_seqlens, work.index[0], starts)
    work.check(ragged_attention(*call, lengths))
    with pytest.raises(AssertionError, match="NaN"):
        work.check(ragged_attention(*call, torch.full_like(lengths, 9)))


@pytest.mark.parametrize("fault", ["nothing written", "one column too far", "neighbor written"])
def test_gate_refuses_a_wrong_insertion(options, modules, monkeypatch, fault):
    from baton_kernels import insert_kv

    def insert(key, value, keys, values, cu_seqlens, slots, starts):
        if fault == "nothing written":
            return
        shift = 1 if fault == "one column too far" else 0
        insert_kv(key, value, keys, values, cu_seqlens, slots, starts + shift)
        if fault == "neighbor written":
            keys[slots[0], :, starts[0] - 1] = 0.0

    cases = modules("copy_cases")
    monkeypatch.setattr(cases, "insert_kv", insert)
    work = next(cases.insert(options))
    notes = {way.name: modules("measure").refused(way) for way in work.ways if way.check}
    assert notes.pop("insert_kv").startswith("refused: ")
    # The peers write to the same places and are judged by what they write themselves.
    assert set(notes.values()) == {""}


def test_wrong_op_fails_the_run(main, modules, monkeypatch, capsys):
    monkeypatch.setattr(modules("layer_cases").bk, "silu_and_mul", lambda x: x[:, ::2] * 2)
    assert main.main(["--tiny", "--no-peers", "--case", "rows", "--dtype", "float32"]) == 1
    assert "silu_and_mul of 2 x 1536 (SmolLM2-135M), baton_kernels: refused" in (
        capsys.readouterr().err
    )


def test_figures_of_a_row(modules):
    measure = modules("measure")
    ways = [
        measure.Way("a", [lambda: 1], kind="ours", times=[0.002, 0.004, 0.003]),
        measure.Way("b", [lambda: 1], times=[0.006]),
        measure.Way("c", missing="not here"),
    ]
    work = measure.Work("w", "float32", ways, bytes=6_000_000, ceiling="read")
    rows = measure.measure("case", work, measure.Effort(), lambda call: 0.0, 1)
    assert [row.median_us for row in rows] == [3000.0, 6000.0, None]
    assert (rows[0].p10_us, rows[0].p90_us) == pytest.approx((2200.0, 3800.0))
    assert [row.rate for row in rows] == pytest.approx([2.0, 1.0, None])
    assert [row.ratio for row in rows] == [1.0, 2.0, None]
    assert rows[2].note == "missing: not here"
    modules("report").add_shares(rows, {"read": 4.0})
    assert [row.share for row in rows] == [0.5, 0.25, None]


def test_ways_take_turns(modules):
    measure, order = modules("measure"), []
    ways = [
        measure.Way(name, [lambda name=name, i=i: order.append((name, i)) for i in range(2)])
        for name in "ab"
    ]
    times = itertools.chain([1.0, 2.0], itertools.repeat(3.0))

    def clock(call):
        call()
        return next(times)

    found = measure.time_in_turns(ways, measure.Effort(seconds=4.0, least=2, most=9), clock)
    # "a" is finished when its runs add up to 4 seconds, and so is "b".
    assert found == {"a": [1.0, 3.0], "b": [2.0, 3.0]}
    # Warmed up with the first copy, then in turns, copy after copy.
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]


def test_ways_with_threads_of_their_own_have_runs_together(modules):
    measure, order = modules("measure"), []
    ways = [measure.Way(name, [lambda name=name: order.append(name)]) for name in "ab"]
    effort = measure.Effort(seconds=0.0, least=9, most=9)
    found = measure.time_in_turns(
        ways, effort, lambda call: call() or 0.001, settle=lambda: order.append("settle")
    )
    assert found == {"a": [0.001] * 9, "b": [0.001] * 9}
    first = ["settle", *"a" * 9, "settle", *"b" * 9]
    assert order == ["a", "b", *first, "settle", "a", "a", "settle", "b", "b"]


def test_short_calls_are_timed_together(modules):
    measure, count = modules("measure"), itertools.count()
    way = measure.Way("a", [lambda: next(count)])
    effort = measure.Effort(seconds=0.0, least=2, most=2)
    found = measure.time_in_turns([way], effort, lambda call: call() or 5.0, inner=10)
    assert found == {"a": [0.5, 0.5]}
    assert next(count) == 1 + 2 * 10


def test_results_are_kept_until_the_next_turn(modules):
    calls = modules("measure").kept([lambda: torch.ones(64), lambda: torch.ones(64)])
    first, second = calls[0](), calls[1]()
    assert first.data_ptr() != second.data_ptr()
    place = first.data_ptr()
    del first
    # Still in use: a new tensor cannot get the same address.
    assert torch.ones(64).data_ptr() != place


def test_decode_lengths(modules):
    lengths = modules("attention_cases").decode_lengths(32, 128, 2048, 686)
    assert (min(lengths), max(lengths), len(lengths)) == (128, 2048, 32)
    assert abs(sum(lengths) / 32 - 686) < 2
    state = random.getstate()
    assert lengths == modules("attention_cases").decode_lengths(32, 128, 2048, 686)
    assert random.getstate() == state


def test_work_counts_what_is_visible(options, modules):
    module = modules("attention_work")
    work = module.AttentionWork(
        module.Heads(4, 2, 16), [3, 1], [5, 7], dtype=torch.float32, device=options.device
    )
    assert work.columns == 12
    assert work.bytes == 2 * 12 * 2 * 16 * 4
    # Tokens see 3, 4 and 5 keys, then 7.
    assert work.pairs == 19
    assert work.flops == 4 * 19 * 4 * 16


@pytest.mark.parametrize("threads", [1, 2])
def test_readers_read_everything_once(modules, threads):
    limits = modules("limits")
    # Several chunks and a rest that no number of streams divides.
    memory = limits.buffer((3 << 18) + 64 * 37, huge_pages=False)
    assert memory.data_ptr() % 64 == 0
    words = memory.view(torch.int64).random_().numpy().copy()
    expected = int(words[0])
    for word in words[1:].tolist():
        expected ^= word
    for streams, ahead in limits.READERS:
        got = limits.library().limits_read(
            memory.data_ptr(), memory.nbytes, threads, streams, ahead
        )
        assert got == expected % (1 << 64), (streams, ahead)


@pytest.mark.parametrize("function", ["limits_memcpy", "limits_stream"])
def test_copies_copy_everything(modules, function):
    limits = modules("limits")
    source, target = (limits.buffer((1 << 18) + 64 * 5, huge_pages=False) for _ in range(2))
    source.random_()
    assert not torch.equal(source, target)
    getattr(limits.library(), function)(target.data_ptr(), source.data_ptr(), source.nbytes, 2)
    assert torch.equal(source, target)


def test_record_pictures_and_markdown(main, modules, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(modules("vllm_peer"), "PYTHON", Path("nowhere"))
    record, pictures = tmp_path / "record.json", tmp_path / "figures"
    code = main.main([
        "--tiny", "--case", "decode", "padding", "scaling", "--dtype", "float32", "bfloat16",
        "--no-peers", "--threads", "1", "--json", str(record), "--output", str(pictures),
        "--markdown",
    ])  # fmt: skip
    assert code == 0
    found = json.loads(record.read_text())
    assert set(found) == {"machine", "cases"}
    assert {"device", "name", "isa", "threads", "versions", "commit"} == set(found["machine"])
    assert {"baton_kernels", "torch", "python"} <= set(found["machine"]["versions"])
    assert list(found["cases"]) == ["decode", "padding", "scaling"]
    for case in found["cases"].values():
        assert set(case) == {"title", "rows", "lines"}
        assert {row["dtype"] for row in case["rows"]} == {"float32", "bfloat16"}
        for row in case["rows"]:
            assert isinstance(row["median_us"], float)
            assert row["threads"] == 1
    names = {"roofline", "capacity", "columns", "decode", "long_row"}
    assert {file.stem for file in pictures.iterdir()} == names
    for file in pictures.iterdir():
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert 5_000 < file.stat().st_size < 100_000
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("| 32 rows of 128..2048 |")]
    assert len(table) == 3 * 2  # ours in small and huge pages and the limit, in two dtypes
    assert all(line.count("|") == 8 for line in table)


def test_document_is_filled(modules, tmp_path):
    path, fill = tmp_path / "page.md", modules("report").fill
    path.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n")
    fill(path, "x", "\nnew\n")
    fill(path, "x", "newer")
    fill(path, "y", "| 1 |")
    assert path.read_text() == (
        "a\n<!-- x -->\nnewer\n<!-- /x -->\nb\n<!-- y -->\n| 1 |\n<!-- /y -->\n"
    )
    with pytest.raises(ValueError, match="must have <!-- z -->"):
        fill(path, "z", "text")


def test_page_has_a_place_for_every_table(main):
    text = (Path(main.__file__).parents[2] / "docs" / "performance" / "tables.md").read_text()
    for name in main.CASES:
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->") == 1
        commands = [line for line in text.splitlines() if "python -m bench.kernels --case" in line]
        assert any(name in line.partition("--case")[2] for line in commands)


def test_straight_line_is_found(modules):
    measure, cases = modules("measure"), modules("attention_cases")
    rows = [
        measure.Row("scaling", f"{n}", "float32", threads, "ragged_attention", "ours",
                    median_us=5.0 + 0.25 * n / threads, values={"columns": n})
        for threads in (1, 2)
        for n in (100, 200, 400)
    ]  # fmt: skip
    lines = cases.scaling_summary(rows)
    assert lines[0].startswith("float32, 1 threads: 5.0 us + 250.00 ns per column; residuals ")
    assert "2 threads are 2.00x as fast as 1" in lines[2]


def test_missing_vllm_is_named(options, modules):
    work = modules("attention_work")
    made = work.AttentionWork(
        work.Heads(2, 1, 16), [1], [3], dtype=torch.float32, device=options.device
    )
    ways = options.vllm.ways(made, options.effort)
    assert [(way.name, way.missing) for way in ways] == [
        ("vLLM cpu_attention", "run `make bench-peers`")
    ]


def test_broken_vllm_is_named(options, modules, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho something\nexit 3\n")
    python.chmod(0o755)
    work = modules("attention_work")
    made = work.AttentionWork(
        work.Heads(2, 1, 16), [1], [3], dtype=torch.float32, device=options.device
    )
    (way,) = modules("vllm_peer").Vllm(python).ways(made, options.effort)
    assert way.missing == "the process of vLLM ended with code 3"


def test_a_peer_that_fails_is_missing_and_ours_is_an_error(modules):
    measure = modules("measure")

    def fails():
        raise RuntimeError("no kernel\nfor this")

    for kind in (measure.PEER, measure.OURS):
        way = measure.Way("it", [fails], check=lambda result: None, kind=kind)
        if kind == measure.PEER:
            assert measure.refused(way) == "missing: RuntimeError: no kernel"
        else:
            with pytest.raises(RuntimeError):
                measure.refused(way)


def test_a_small_card_ends_a_table_early(main, options, monkeypatch):
    whole = main.CASES["decode"].works

    def works(options):
        yield next(whole(options))
        raise torch.OutOfMemoryError("17 GiB are not there")

    monkeypatch.setattr(main.CASES["decode"], "works", works)
    rows, lines = main.run_case("decode", options)
    assert rows and lines[0] == "ended early: OutOfMemoryError: 17 GiB are not there"


def test_benchmarks_are_listed(capsys):
    import_bench("__main__").main()
    printed = capsys.readouterr().out
    for name in ("kernels", "relay", "simulate", "cuda_static", "amx"):
        assert f"python -m bench.{name}\n" in printed
