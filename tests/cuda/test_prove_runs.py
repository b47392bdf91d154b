"""The long run of the proofs: its units, what it keeps, and what it says of branches."""

import pickle

import pytest

from emulation.prove import branches, report, runs
from emulation.prove.claims import BATCH, HIDDEN, Claim, Coverage
from emulation.prove.everything import is_expected, units


@pytest.mark.parametrize("architecture", [75, 80])
def test_units_have_names_and_travel(architecture):
    found = list(units(architecture))
    assert len({unit.name for unit in found}) == len(found)
    for unit in found:
        assert pickle.loads(pickle.dumps(unit)).what == unit.what
        assert all(runs.path_of(stem).exists() for stem in unit.sources)
        # The name under which a result is kept is the same in every process.
        assert "0x" not in unit.what


def test_results_are_kept(tmp_path, monkeypatch):
    """A result is kept for the same unit and the same PTX; a change of either repeats it."""
    text, proved = "as it was", []
    monkeypatch.setattr(runs, "BUILD", tmp_path)
    monkeypatch.setattr(runs, "nvcc_version", lambda: "nvcc")
    monkeypatch.setattr(runs, "normalized", lambda path, architecture: text)

    def prove(prover):
        proved.append(prover.architecture)
        prover.claim("kernel", HIDDEN, "a grid").check(True, "")
        prover.coverage["kernel<64>"] = Coverage({7: [1, 0]}, {7: "@%p1 bra"}, {7: "a.h:3"})

    def result(what):
        return runs.result_of(runs.Unit("a unit", ("move_kv",), prove, what), 80)

    first = result("a grid")
    again = result("a grid")
    assert proved == [80]
    assert again.claims == first.claims == [Claim("kernel", 80, HIDDEN, "a grid", 1)]
    assert again.coverage["kernel<64>"].reached == {7: [1, 0]}
    result("another grid")
    text = "another PTX"
    result("a grid")
    assert len(proved) == 3


def fail(prover):
    raise KeyError("num")


def test_a_unit_with_an_error_does_not_end_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runs, "BUILD", tmp_path)
    monkeypatch.setattr(runs, "normalized", lambda path, architecture: "")
    unit = runs.Unit("a unit", ("move_kv",), fail, "a grid")
    results = list(runs.run([(unit, 75), (unit, 80)], 1))
    assert [result.architecture for result in results] == [75, 80]
    for result in results:
        assert result.claims[0].evidence == "KeyError('num')" and not runs.is_kept(unit, 80)
        assert not is_expected(result.claims[0])
    assert "in fail" in capfd.readouterr().err


def coverage(taken: int, not_taken: int, line: str) -> Coverage:
    return Coverage({3: [taken, not_taken]}, {3: "@%p1 bra $L_1"}, {3: line})


def test_an_outcome_without_a_reason_counts():
    line = "/somewhere/csrc/cuda/ragged_attention/decode.h:80"
    kernels = {("decode<half, 64, 1>", 80): coverage(2, 0, line)}
    assert branches.summary(kernels)[1] == 1
    # Another instance of the template has both.
    kernels["decode<half, 80, 1>", 80] = coverage(1, 1, line)
    assert branches.summary(kernels)[1] == 0
    assert any(branches.ELSEWHERE in text for text in branches.markdown(kernels))


@pytest.mark.parametrize(("path", "part", "text"), branches.NAMED)
def test_reasons_name_lines_that_exist(path, part, text):
    every = [x for folder in branches.FOLDERS for x in (runs.ROOT / folder).rglob("*.*")]
    files = [x for x in every if path.partition(":")[0] in str(x) and x.suffix != ".pyc"]
    found = [line for x in files for line in x.read_text().splitlines() if part in line]
    assert found and text


def test_table_says_what_is_refuted(tmp_path):
    claims = [
        Claim("decode, bfloat16", 80, HIDDEN, "", 3),
        Claim("decode, bfloat16, 80 dims", 80, HIDDEN, "", 2, "padding 7"),
        Claim("decode, bfloat16", 80, BATCH, "", 4),
    ]
    text = "\n".join(report.markdown(claims))
    assert "| decode | bfloat16 | sm_80 | proved, 5, but **refuted**: decode, bfloat16, 80" in text
    assert "proved, 4" in text and [is_expected(claim) for claim in claims] == [True, False, True]
    assert "not expected" in report.evidence(claims)[0]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- proofs -->\nold\n<!-- /proofs -->\nb\n")
    report.fill(page, ["new"])
    assert page.read_text() == "a\n<!-- proofs -->\nnew\n<!-- /proofs -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(ValueError, match="must have <!-- proofs -->"):
        report.fill(page, ["new"])
