"""The op tests on the Triton kernels, in Triton's interpreter: results without a GPU.

Whether Triton interprets is decided when it is imported, so the tests run in a separate process,
for which tests/conftest.py has the Triton kernels as the only backend. By hand, for whole files:
`TRITON_INTERPRET=1 python -m pytest tests/ops/test_rms_norm.py -k triton`.
"""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import pytest

import baton_kernels

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The interpreter takes milliseconds per program, so only tests with few programs run. Layouts,
# options, poison and batch invariance are among them. `make test` takes each case in one dtype, in
# turns (tests/support/judged.py); --full takes it in all.
SMALL = "not triton-1000 and not triton-128-"
ATTENTION = (
    "test_matches_reference and not long and not mixture",
    "test_layouts",
    "test_padding_is_not_read and (everything or 24)",
    "test_batch_invariance and thirds",
    "test_no_rows or test_rows_without or test_more_query or test_large_scores or test_by_hand",
)
HIDDEN = (
    "test_hidden_keys and prefill and value",
    "test_every_token and (6-540 or 33-60 or 20-20)",
)
PAGED = (
    "test_by_hand or test_no_rows or test_rows_without or test_strided_table",
    "test_same_bits_as_dense and 24",
    "test_rows_share_pages",
    "test_hidden_values",
)
SELECTED = {
    "append_kv": SMALL + " and not (large_batch and (14 or 32)) and not (test_batch and 24)",
    "attention_mask": SMALL,
    "extract_kv": SMALL + " and not (test_out and layers1) and not (test_more and layers0)",
    "insert_kv": SMALL + " and not (test_more and (layers0 or layers2))",
    "likeliest": SMALL,
    "linear": SMALL + " and not (test_batch_invariance and 576)",
    "masked_softmax": SMALL
    + " and not triton-63 and not test_rows and (not test_windows or triton-9)",
    "merge_attention": SMALL,
    "move_kv": SMALL,
    "ragged_attention": " or ".join(f"({case})" for case in ATTENTION),
    "ragged_attention_hidden": " or ".join(f"({case})" for case in HIDDEN),
    "ragged_attention_paged": " or ".join(f"({case})" for case in PAGED),
    "rms_norm": SMALL + " and not test_large_results",
    "silu_and_mul": SMALL + " and not test_large_results",
    "triton_torch": "test_triton",
}
# Left to --full, which `make test-cuda-build` runs.
FEWER = {
    "append_kv": " and not test_head_dims and not test_layouts and not test_heads",
    "extract_kv": " and not test_out and not test_many and not test_more",
    "insert_kv": " and not test_layouts and not test_more",
    "linear": " and not test_batch_invariance and not test_long_sums",
    "masked_softmax": " and not test_windows and not test_queries",
    "ragged_attention": " and not test_batch_invariance and not test_layouts",
    "ragged_attention_paged": " and not test_hidden_values",
    "triton_torch": " and (opcheck or compile) and default",
}


# A process takes seconds to start, so the tests of several ops share one; there are several
# processes, so that each core has something to do.
GROUPS = {
    "attention, projections, torch": (
        "ragged_attention",
        "ragged_attention_hidden",
        "ragged_attention_paged",
        "linear",
        "triton_torch",
    ),
}
GROUPS["others"] = tuple(op for op in SELECTED if op not in sum(GROUPS.values(), ()))


def run(
    ops: Sequence[str], folder: pathlib.Path, every_case: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """The names of the tests that ran, by op, and the texts of those that failed."""
    report = folder / "report.xml"
    paths = [str(next((ROOT / "tests").glob(f"*/test_{op}.py"))) for op in ops]
    selected = (
        SELECTED if every_case else {op: f"({SELECTED[op]}){FEWER.get(op, '')}" for op in ops}
    )
    chosen = " or ".join(f"(test_{op}.py and ({selected[op]}))" for op in ops)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-W", "ignore", f"--junitxml={report}", *(["--full"] if every_case else []),
         "-k", f"triton and ({chosen})", *paths],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert report.is_file(), done.stdout + done.stderr
    ran, failed = {op: [] for op in ops}, []
    for case in ElementTree.parse(report).iter("testcase"):
        ran[case.get("classname").rpartition("test_")[2]].append(case.get("name"))
        failed += [f"{case.get('name')}: {part.text}" for part in case if part.tag != "skipped"]
    return ran, failed


def test_every_op_is_selected():
    assert set(baton_kernels.triton.OPS) <= SELECTED.keys()
    assert sorted(sum(GROUPS.values(), ())) == sorted(SELECTED)


@pytest.mark.long
@pytest.mark.parametrize("group", GROUPS)
def test_ops(group, tmp_path, every_case):
    """For `triton_torch`: opcheck, torch.compile and index values out of range."""
    ran, failed = run(GROUPS[group], tmp_path, every_case)
    assert not failed, "\n\n".join(failed)
    for op, names in ran.items():
        sections = ("matches_reference", "by_hand")
        if op == "triton_torch":
            assert len(names) >= 2 * len(baton_kernels.triton.OPS)
            continue
        if op == "ragged_attention_paged":
            sections = ("same_bits_as_dense", "by_hand")
        if op == "ragged_attention_hidden":
            sections = ("hidden_keys", "every_token")
        for section in sections:
            assert any(section in name for name in names), f"{section} is not among {names}"
        print(f"{op}: {len(names)} tests passed on the interpreter")
