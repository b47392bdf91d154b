"""`scripts/soak.py equality`: a few cases of every op, and that planted defects are found."""

import equality_run
import pytest

import baton_kernels


def test_rows_have_their_bits_in_any_call():
    report = equality_run.run(19, range(60))
    assert not report.wrong
    assert set(report.rows) == set(equality_run.CASES)


@pytest.mark.parametrize("op", ["ragged_attention", "linear"])
def test_a_row_that_knows_its_batch_is_found(op, monkeypatch):
    whole = getattr(baton_kernels, op)

    def leaky(*arguments, **options):
        result = whole(*arguments, **options)
        first = result[0] if isinstance(result, tuple) else result
        rows = len(options["lengths"]) if op == "ragged_attention" else len(first)
        if rows > 1 and first.numel():
            first.view(-1)[0] += 1
        return result

    monkeypatch.setattr(baton_kernels, op, leaky)
    names = [wrong.split(":")[0] for _, wrong in equality_run.run(19, range(60)).wrong]
    assert set(names) == {op}
