"""Random invalid calls of torch.ops: nothing breaks (support/hostile_run.py).

`make soak` makes a million of them. They run in a separate program, whose children are forks of a
process without threads.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import hostile_calls
import hostile_run
import torch
from hostile_defects import DEFECTS

RANDOM_CALLS = 1500
ROOT = Path(__file__).resolve().parents[2]


def soak(*arguments: object, status: int = 0) -> str:
    """The output of the program."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "soak.py", *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_the_saved_calls_still_reach_what_they_were_saved_for():
    """`python scripts/soak.py corpus` saves new ones when the generator has changed."""
    _, indices = hostile_run.corpus()
    kinds = re.search(r"([\d,]+) kinds of outcome", soak("hostile", "--saved"))
    assert int(kinds[1].replace(",", "")) >= 0.95 * len(indices)


def test_random_calls_break_nothing():
    printed = soak("hostile", "--calls", RANDOM_CALLS, "--seed", random.randrange(2**32))
    accepted = int(re.search(r"([\d,]+) accepted", printed)[1].replace(",", ""))
    # Both halves of the judge must have had something to do.
    assert RANDOM_CALLS // 5 < accepted < 4 * RANDOM_CALLS // 5


def test_every_overload_is_called():
    r = random.Random(0)
    drawn = {hostile_calls.draw_call(r)[:2] for _ in range(3000)}
    private = {"set_cpu_isa", "cpu_isas", "cuda_build", "use_torch_threads"}
    names = [name for name in torch._C._dispatch_get_all_op_names() if "baton_kernels::" in name]
    known = {tuple((n.partition("::")[2] + ".default").split(".")[:2]) for n in names}
    assert {call for call in known if call[0] not in private} == drawn


def test_planted_defects_are_found():
    insertions = [
        i for i in range(400) if hostile_calls.draw_call(random.Random(f"0:{i}"))[0] == "insert_kv"
    ]
    printed = soak("hostile", "--seed", 0, "--plant", "--only", *insertions, status=1)
    for defect, what in DEFECTS.items():
        of_this = printed.partition(f"planted: {defect}")[2].partition("planted:")[0]
        assert what in of_this, f"{defect}: {printed}"
