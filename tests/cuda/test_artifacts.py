"""Cached compiled files: what makes a new one, and what two processes do at once."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emulation import artifacts, build
from emulation.artifacts import ROOT, kept


def counted(folder, made_from):
    """The cached file for these contents; each time it is made, a line is added to `made`."""

    def make(path):
        with open(folder / "made", "a") as file:
            file.write("once\n")
        path.write_text(repr(made_from))

    return kept(folder / "kept" / "a.txt", made_from, make)


def test_a_file_is_made_once_per_content(tmp_path):
    first = counted(tmp_path, ["compiler", b"source"])
    assert counted(tmp_path, ["compiler", b"source"]) == first
    other = counted(tmp_path, ["compiler", b"another source"])
    assert counted(tmp_path, ["another compiler", b"source"]) not in (first, other)
    # Moving text from one part to the next changes the content.
    assert counted(tmp_path, ["compilers", b"ource"]) != first
    assert len((tmp_path / "made").read_text().splitlines()) == 4
    # One branch does not discard what another one has made.
    assert first.exists() and first.read_text() == repr(["compiler", b"source"])


def test_what_nobody_wants_any_more_is_removed(tmp_path, monkeypatch):
    first = counted(tmp_path, ["a"])
    monkeypatch.setattr(artifacts, "KEPT_SECONDS", -1)
    second = counted(tmp_path, ["b"])
    assert not first.exists() and second.exists()


def test_nothing_is_kept_of_a_failure(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("the compiler says no")

    with pytest.raises(RuntimeError, match="says no"):
        kept(tmp_path / "a.txt", ["a"], fail)
    assert list(tmp_path.glob("*")) == list(tmp_path.glob(".*.lock"))


PROCESS = """
import pathlib, time
from emulation.artifacts import kept
folder = pathlib.Path({folder!r})
def make(path):
    with open(folder / "made", "a") as file:
        file.write("once\\n")
    time.sleep(0.3)
    path.write_text("whole")
assert kept(folder / "a.txt", ["a"], make).read_text() == "whole"
"""


def test_processes_that_want_one_file_make_it_once(tmp_path):
    code = PROCESS.format(folder=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "made").read_text() == "once\n"


def test_another_header_makes_another_object(tmp_path):
    """The hash covers headers, with their contents and names."""
    header = tmp_path / "header.h"
    header.write_text("int a;")
    before = artifacts.hash_of([header])
    header.write_text("int b;")
    assert artifacts.hash_of([header]) != before
    found = build.with_includes(build.KERNELS[0], (ROOT / "csrc", ROOT / "python"))
    assert ROOT / "csrc" / "cuda" / "device" / "device.h" in found
    assert ROOT / "python" / "emulation" / "cuda" / "cuda_emulation.h" in found


FAKE_NVCC = """#!/bin/sh
# Like nvcc: intermediate files whose names two runs may share.
echo "$TMPDIR" > "$2"
echo "$2" > "$TMPDIR/tmpxft"
while [ "$(ls {folder} | grep -c '[.]out$')" -lt 2 ]; do sleep 0.05; done
test "$(cat "$TMPDIR/tmpxft")" = "$2"
"""


def test_every_run_of_nvcc_has_its_own_temporary_folder(tmp_path, monkeypatch):
    """Two run at once and wait for each other."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(folder=tmp_path))
    nvcc.chmod(0o755)
    monkeypatch.setattr(artifacts, "tool", lambda name: str(nvcc))
    targets = [tmp_path / "a.out", tmp_path / "b.out"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda target: artifacts.run_nvcc("-o", target), targets))
    folders = [Path(target.read_text().strip()) for target in targets]
    assert folders[0] != folders[1] and not any(folder.exists() for folder in folders)


def test_nothing_else_runs_nvcc():
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("python", "tests", "bench")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"tool\(.nvcc.\)[,\]]|\[nvcc\b", path.read_text())
    ]
    here = Path(__file__).relative_to(ROOT).as_posix()
    assert sorted(found) == sorted(["python/emulation/artifacts.py", here])
    for script in ("cuda_build.sh", "gpu.sh"):
        assert "TMPDIR=" in (ROOT / "scripts" / script).read_text(), script
