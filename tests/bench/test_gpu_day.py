"""The GPU day run on a CPU: every stage at small sizes, and stages that fail, hang and die."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
from turns import made_once

from bench.gpu_day import carried, ncu
from bench.gpu_day.graph import GPU_TESTS
from bench.gpu_day.record import Record
from bench.gpu_day.runner import Day, table
from bench.gpu_day.stages import STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
# The beginning of every stage in these tests: the arguments of a stage.
ARGUMENTS = """
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float)
parser.add_argument("--json", type=pathlib.Path)
options = parser.parse_args()
def save(**content):
    options.json.write_text(json.dumps({"rows": [], "begun": [], **content}))
"""


def day(folder, stages, seconds=900.0):
    """Runs stages with this code; returns what the record on disk says after each of them."""
    package = folder / "some_stages"
    package.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = Day(folder / "out", seconds, (), environment, {"commit": "abc"})
    seen = []
    for name, (cap, code) in stages.items():
        (package / f"{name}.py").write_text(ARGUMENTS + textwrap.dedent(code))
        run.run(Stage(name, cap, (), "a stage of a test", f"some_stages.{name}"))
        seen.append(json.loads((folder / "out" / "results.json").read_text()))
    return seen, (folder / "out" / "logs.txt").read_text()


def test_stages_that_fail_hang_or_die_end_no_other(tmp_path):
    seen, logs = day(
        tmp_path,
        {
            "failing": (60, "print('what went wrong'); sys.exit(3)"),
            "hanging": (5, "save(headline='half'); print('on', flush=True); time.sleep(60)"),
            "stubborn": (5, """
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print('deaf', flush=True); time.sleep(60)
            """),
            "dying": (60, "os.kill(os.getpid(), signal.SIGSEGV)"),
            "skipping": (60, "save(headline='no such tool'); sys.exit(77)"),
            "good": (60, "save(headline='well', lines=['one more'], rows=[{'case': 'a'}])"),
        },
    )  # fmt: skip
    states = [entry["state"] for entry in seen[-1]["stages"]]
    assert states == ["failed (3)", "hung", "hung", "died (SIGSEGV)", "skipped", "ok"]
    # Written to disk after each stage, not at the end.
    assert [len(record["stages"]) for record in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1]["commit"] == "abc"
    failing, hanging, stubborn, _, skipping, good = seen[-1]["stages"]
    assert failing["headline"] == "what went wrong"
    assert hanging["headline"] == "half" and hanging["seconds"] < 60
    assert stubborn["headline"] == "deaf"
    assert good["rows"] == [{"case": "a"}] and skipping["headline"] == "no such tool"
    assert "==== hanging: hung" in logs and "what went wrong" in logs
    text = table(seen[-1]["stages"])
    assert "dying      died (SIGSEGV)" in text and "one more" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["logs.txt", "results.json"]


def test_workers_that_a_stage_leaves_behind_are_ended(tmp_path):
    day(
        tmp_path,
        {"leaving": (60, """
            import subprocess
            job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            save(rows=[job.pid])
        """)},
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    (pid,) = record["stages"][0]["rows"]
    # An orphan has no parent that waits for it, so it takes the system a moment to remove it.
    for _ in range(600):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_a_broken_device_costs_one_case(tmp_path):
    """The stage continues in a new process after the case that broke it."""
    seen, _ = day(
        tmp_path,
        {"broken": (60, f"""
            sys.path.insert(0, {str(ROOT)!r})
            from bench.gpu_day.record import Record
            record = Record(options.json, options.seconds)
            for case in ("first", "second", "third"):
                if record.wants(case):
                    if case == "second":
                        sys.exit(71)
                    record.add(case)
        """)},
    )  # fmt: skip
    (entry,) = seen[-1]["stages"]
    assert entry["state"] == "failed, then ok in process 2"
    assert entry["earlier"] == ["failed (71)"]
    assert [row["case"] for row in entry["rows"]] == ["first", "third"]


def test_no_stage_begins_without_time(tmp_path):
    seen, _ = day(tmp_path, {"late": (60, "save(headline='ran')")}, seconds=1.0)
    assert seen[-1]["stages"][0]["state"] == "no time"


def test_a_case_that_raises_is_a_row(tmp_path):
    record = Record(tmp_path / "record.json", 60)
    with record.attempt("bad"):
        raise ValueError("no good")
    assert record.wants("late", seconds=100) is False
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert rows == [
        {"case": "bad", "error": "ValueError: no good"}, {"case": "late", "error": "no time"},
    ]  # fmt: skip


# The stages themselves: a dozen processes. `make test-cuda-build` runs them.


@pytest.fixture(scope="module")
def results(request):
    """Every stage on the CPU, run by the command: stages, its status and output, its folder."""

    def run(folder):
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu_day", "--device", "cpu", "--minutes", "60",
             "--patience", "10", "--output", folder / "output"],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        (folder / "done.json").write_text(json.dumps([done.returncode, done.stdout]))

    folder = made_once(request, "gpu_day", run)
    record = json.loads((folder / "output" / "results.json").read_text())
    done = json.loads((folder / "done.json").read_text())
    return {entry["stage"]: entry for entry in record["stages"]}, done, folder / "output"


@pytest.mark.full
@pytest.mark.slow
def test_the_command_runs_every_stage(results):
    entries, (code, printed), folder = results
    assert list(entries) == [stage.name for stage in STAGES]
    states = {name: entry["state"] for name, entry in entries.items()}
    skipped = {"sanitizer", "ncu"} | ({"amx"} if states["amx"] == "skipped" else set())
    assert states == {name: "skipped" if name in skipped else "ok" for name in states}, (
        folder / "logs.txt"
    ).read_text()
    assert code == 0
    assert (folder / "table.txt").read_text().strip() in printed
    assert len(list(folder.iterdir())) <= 8


@pytest.mark.full
@pytest.mark.slow
def test_what_the_stages_find(results):
    entries, _, _ = results
    assert entries["probe"]["headline"].endswith("17 calls right, 0 wrong")
    assert {row["case"]: row.get("read_by") for row in entries["probe"]["rows"]}["rates"]
    assert "0 failed" in entries["ops"]["headline"]
    assert not entries["ops"]["headline"].startswith("0 passed")
    again, relay = entries["graph"]["rows"]
    assert again["equal"] > 1 and relay["replayed_steps"] > 5 and relay["equal_logits"] > 50
    decodes = [row for row in entries["decode"]["rows"] if "ways" in row]
    assert len(decodes) == 17
    assert all(way.get("us") or way.get("note") for row in decodes for way in row["ways"])
    assert all(row["share"] > 0 for row in decodes)
    for name in ("copies", "linear", "prefill"):
        rows = entries[name]["rows"]
        assert rows and all(row["ways"][0]["us"] > 0 for row in rows)
    rows = {row["case"]: row for row in entries["relay"]["rows"]}
    for name in ("baton", "baton, launched by the host", "orca", "run_to_completion", "generate"):
        assert rows[name]["equal_queries"] == rows[name]["queries"] == 4


def test_every_file_with_tests_for_gpus_is_run():
    """Their names begin with test_gpu, which is how `make gpu` chooses them."""
    marked = r"@needs_(?:two_)?gpus?\n(?:@.*\n)*def (\w+)"
    found = {
        path.name: re.findall(marked, path.read_text())
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    found = {name: tests for name, tests in found.items() if tests}
    assert found.keys() == set(GPU_TESTS)
    assert all(test.startswith("test_gpu") for tests in found.values() for test in tests)


# Files that are sent to the GPU machine.


def test_carried_libraries_and_peers_are_found(tmp_path):
    folder, root = tmp_path / "carry", tmp_path / "root"
    for part in (folder / "lib", folder / "peers", root / "baton_kernels"):
        part.mkdir(parents=True)
    (folder / "lib" / "libbaton_kernels_cuda.so").write_bytes(b"new")
    (root / "baton_kernels" / "libbaton_kernels_cuda.so").write_bytes(b"old")
    with zipfile.ZipFile(folder / "peers" / "peer.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("some_peer/__init__.py", "here = 1")
    (folder / "commit").write_text("abc\n")
    environment = carried.environment(root)
    lines = carried.unpack(folder, root, environment)
    assert lines == ["library libbaton_kernels_cuda.so, 3 bytes", "peer peer"]
    assert (root / "baton_kernels" / "libbaton_kernels_cuda.so").read_bytes() == b"new"
    code = "import some_peer, os; print(some_peer.here, os.environ['FLASHINFER_WORKSPACE_BASE'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", str(folder / "site")]
    assert carried.commit(folder, "unknown") == "abc"
    assert carried.commit(folder, "def") == "def"


NCU = """\
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","","ns","register/thread"
"0","7","void baton::cuda::decode_kernel<__nv_bfloat16, 128, 1>(Params)","100,352","168"
"""


def test_counters_are_read():
    name = "void baton::cuda::decode_kernel<__nv_bfloat16, 128, 1>(Params)"
    assert ncu.launches(NCU) == [{"kernel": name, "time": "100,352", "registers": "168"}]
    assert ncu.launches("==ERROR== no permission") == []


POISONED = """
import pytest, torch

@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

broken = []

def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.synchronize = synchronize
torch.cuda.is_available = lambda: True
torch.cuda.is_initialized = lambda: True

@pytest.mark.parametrize("i", range(6))
def test_some(i):
    if i == 2:
        broken.append(i)
    synchronize()
"""


def test_a_test_that_breaks_the_device_fails_alone(tmp_path):
    """The worker is replaced, and the next one runs what it had left."""
    (tmp_path / "test_poisoned.py").write_text(POISONED)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p",
        "bench.gpu_day.poison", f"--rootdir={tmp_path}", str(tmp_path),
    ]  # fmt: skip
    one = subprocess.run(
        [*command, "-n", "1", "--max-worker-restart=4"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert "5 passed" in one.stdout, one.stdout
    assert "an illegal memory access" in one.stdout
    # Without workers nothing can run after it.
    alone = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert "2 passed" in alone.stdout and "1 failed" in alone.stdout, alone.stdout
    assert alone.returncode == 71
