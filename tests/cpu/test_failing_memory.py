"""Every allocation of every op fails once: it raises, writes nothing and leaks nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_every_allocation_fails_once(tmp_path):
    library = tmp_path / "failing_memory.so"
    subprocess.run(
        [os.environ.get("CXX", "g++").split()[0], "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall",
         "-Wextra", HERE / "failing_memory.cpp", "-o", library, "-ldl"],
        check=True,
    )  # fmt: skip
    support = HERE.parent / "support"
    done = subprocess.run(
        [sys.executable, support / "failing_memory_child.py", library],
        capture_output=True, text=True, timeout=600, env={**os.environ, "LD_PRELOAD": str(library)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    # Results, defaults of left-out indices, memos of checked values, plans, partial results.
    assert found["allocations"]["append_kv.query"] > 12
    assert found["allocations"]["ragged_attention.lse"] > 12
    assert sum(found["allocations"].values()) > 200
