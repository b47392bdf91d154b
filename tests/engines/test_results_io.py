"""Where results go: always whole lines, and a failed run loses no older file."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from tiny_model import save_tiny_model
from typer.testing import CliRunner

from baton_engines.cli.main import app
from baton_engines.cli.results_io import (
    OutputError,
    ResultWriter,
    finished_ids,
    id_key,
    open_results,
)

OLD = '{"id": 1, "text": "old"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def output(tmp_path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text(OLD)
    return path


def generate(folder, *arguments, **options):
    command = ["generate", "--model", folder, "--slots", 3, "--max-new-tokens", 2, *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in command], **options)


def ids_in(path: Path) -> list:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_results_keep_the_order_of_the_prompts(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_results(path) as stream:
        writer = ResultWriter(stream)
        writer.put(1, {"id": "b"})
        assert stream.num_lines == 0
        writer.put(0, {"id": "a"})
        writer.put(3, {"id": "d", "text": "\ud800"})
        assert stream.num_lines == 2
        writer.flush()
    assert ids_in(path) == ["a", "b", "d"]


def test_results_out_of_order_are_written_at_once(tmp_path):
    with open_results(tmp_path / "results.jsonl", resume=True) as stream:
        ResultWriter(stream, in_order=False).put(1, {"id": "b"})
        assert ids_in(tmp_path / "results.jsonl") == ["b"]


def test_an_older_file_stays_until_the_new_one_is_whole(output):
    output.chmod(0o640)
    with open_results(output) as stream:
        stream.write(b'{"id": 2}\n')
        assert output.read_text() == OLD
    assert ids_in(output) == [2]
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    assert os.listdir(output.parent) == ["answers.jsonl"]


def test_a_link_keeps_pointing_at_the_file(output, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    with open_results(link) as stream:
        stream.write(b'{"id": 2}\n')
    assert link.is_symlink() and ids_in(output) == [2]


def test_a_run_that_fails_keeps_what_it_has_under_another_name(output):
    for number in (1, 2):
        match = r"out; the 1 results so far are in .*partial"
        with pytest.raises(OutputError, match=match), open_results(output) as stream:
            stream.write(b'{"id": 2}\n')
            raise RuntimeError("out")
        assert output.read_text() == OLD
        # The next run overwrites neither of them.
        assert len(list(output.parent.glob("*.partial*"))) == number


def test_a_run_that_has_written_nothing_leaves_nothing(output):
    with pytest.raises(KeyboardInterrupt), open_results(output):
        raise KeyboardInterrupt
    assert os.listdir(output.parent) == ["answers.jsonl"] and output.read_text() == OLD


@pytest.mark.parametrize("written", [0, 7])
def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch, written):
    path, write = tmp_path / "results.jsonl", os.write

    def full(descriptor, data):
        if path.stat().st_size < 10:
            return write(descriptor, bytes(data)[: 10 - path.stat().st_size])
        if path.stat().st_size == 10 and written:
            return write(descriptor, bytes(data)[:written])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    match = "cannot write .*: No space left on device"
    with pytest.raises(OutputError, match=match), open_results(path, resume=True) as stream:
        monkeypatch.setattr(os, "write", full)
        stream.write(b'{"id": 1}\n')
        stream.write(b'{"id": 2, "text": "too long"}\n')
    assert path.read_bytes() == b'{"id": 1}\n'


def test_resuming_goes_on_after_the_last_whole_line(output):
    output.write_text(OLD + '{"id": 2, "te')
    with open_results(output, resume=True) as stream:
        stream.write(b'{"id": 3}\n')
    assert ids_in(output) == [1, 3]
    output.write_text('{"id": 2, "te')
    with open_results(output, resume=True):
        pass
    assert output.read_bytes() == b""


def test_ids_that_are_there(output):
    output.write_text('{"id": 1}\n{"id": "1"}\n{"id": 1}\n{"id": 2')
    assert finished_ids(output) == {id_key(1): 2, id_key("1"): 1}
    assert finished_ids(output.with_name("missing")) == {}
    output.write_text("not a result\n")
    with pytest.raises(ValueError, match="must hold results to resume, .* in line 1"):
        finished_ids(output)


# The command


def test_a_model_that_is_not_there_costs_no_older_answers(output):
    result = generate("./typo", "--prompt", "a", "-o", output)
    assert result.exit_code == 2
    assert output.read_text() == OLD and os.listdir(output.parent) == ["answers.jsonl"]


def test_a_dash_is_standard_output(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = generate(folder, "--prompt", "a", "-o", "-", "-q")
    assert json.loads(result.stdout)["id"] == 1
    assert os.listdir(tmp_path) == []


def test_resuming_answers_what_is_missing(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": {i}, "prompt": "p{i}"}}\n' for i in range(6)))
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    sampled = ["--prompts", prompts, "--temperature", 1.5]
    assert generate(folder, *sampled, "-o", whole).exit_code == 0
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text(lines[4] + lines[1] + lines[2][:9])
    result = generate(folder, *sampled, "-o", parts, "--resume")
    assert result.exit_code == 0 and "2 of 6 queries have results already" in result.stderr
    assert parts.read_text().startswith(lines[4] + lines[1])
    # A resumed query samples as it would have in a single run.
    assert sorted(parts.read_text().splitlines(keepends=True)) == sorted(lines)
    result = generate(folder, *sampled, "-o", parts, "--resume")
    assert result.exit_code == 0 and "6 of 6" in result.stderr


def test_ctrl_c_leaves_the_running_queries_to_the_next_run(folder, tmp_path, monkeypatch):
    import signal

    from baton_engines.cli import report

    updates = []

    def update(self, *_):
        updates.append(1)
        if len(updates) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(report.RunProgress, "update", update)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(
        '{"id": "long", "prompt": "a", "max_new_tokens": 90}\n'
        '{"id": "short", "prompt": "b", "max_new_tokens": 2}\n'
    )
    arguments = ["--prompts", prompts, "-o", output, "--resume"]
    assert generate(folder, *arguments).exit_code == 130
    assert ids_in(output) == ["short"]
    assert generate(folder, *arguments).exit_code == 0
    assert ids_in(output) == ["short", "long"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--resume needs --output with a file"),
        (["-o", "-"], "--resume needs --output with a file"),
        (["-o", "/dev/null"], "--resume needs --output with a file, got /dev/null"),
    ],
)
def test_resuming_needs_a_file(arguments, message):
    result = generate("missing", "--prompt", "a", "--resume", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


FULL = Path("/dev/full")


@pytest.mark.parametrize("redirected", [False, True])
def test_a_full_disk_is_one_line(folder, redirected):
    command = ["-m", "baton_engines.cli", "generate", "--model", folder, "-q"]
    command += ["--prompt", "a", "--max-new-tokens", "1"]
    command += [] if redirected else ["-o", FULL]
    done = warm.run(*command, **{"stdout": str(FULL)} if redirected else {})
    name = "standard output" if redirected else str(FULL)
    assert done.stderr == f"error: cannot write {name}: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-"])
def test_closed_streams(folder, closed):
    command = ["-m", "baton_engines.cli", "generate", "--model", folder, "-q"]
    command += ["--max-new-tokens", "1", *([] if closed == "<&-" else ["--prompt", "a"])]
    if closed == ">&-":  # with a process to itself, which starts so
        done = subprocess.run(
            ["bash", "-c", '"$@" >&-', "", sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    else:
        done = warm.run(*command, **{"stdin" if closed == "<&-" else "stderr": None})
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if closed == ">&-":
        assert done.returncode == 1
        assert done.stderr == "error: cannot write standard output: it is closed\n"
    if closed == "<&-":
        assert done.returncode == 2 and "give --prompts FILE" in done.stderr
    if closed == "2>&-":
        assert done.returncode == 0 and json.loads(done.stdout)["id"] == 1
