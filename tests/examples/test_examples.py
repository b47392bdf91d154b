"""Every program in examples/ runs as it stands, and checks its own results."""

import ast
import difflib
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from tiny_model import save_tiny_model

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples"
PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py"))


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    return warm.run(FOLDER / program, *arguments)


def test_all_programs_are_known():
    assert PROGRAMS == [
        "compile_and_export.py",
        "cuda_graph.py",
        "decode_step.py",
        "insert_between_steps.py",
        "rebatching.py",
        "relay_stream.py",
        "serve_ray.py",
        "static_batch.py",
    ]


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("compile_and_export.py", "it wrote (slot, column) [[0, 127], [2, 64], [3, 1]]"),
        ("decode_step.py", "row 1: 901 tokens"),
        ("insert_between_steps.py", "query 2: the same bits in all 4 steps: True"),
    ],
)
def test_ops(program, printed):
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_cuda_graph():
    done = run("cuda_graph.py")
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        assert "replay 7: 8 tokens per row" in done.stdout
    else:
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.strip() == "cuda_graph.py: needs an NVIDIA GPU, and torch finds none"


def test_relay_stream():
    done = run("relay_stream.py")
    assert done.returncode == 0, done.stderr
    *streamed, first, second, third = done.stdout.splitlines()
    text = re.fullmatch(r"first: \d+ tokens, \w+: (.*)", first)[1]
    assert "\n".join(streamed) == "first: " + ast.literal_eval(text)
    assert second.startswith("second: ") and third.startswith("third: ")


def code_lines(program: str) -> list[str]:
    """A program without its docstring."""
    return (FOLDER / program).read_text().split('"""', 2)[2].splitlines()


@pytest.mark.parametrize(
    "model", ["tiny", pytest.param("the programs' own", marks=pytest.mark.full)]
)
def test_a_static_batch_becomes_a_running_one(model, tmp_path):
    """The same answers in fewer steps, with added lines that are the ones shown in the docs."""
    arguments = [save_tiny_model(tmp_path)] if model == "tiny" else []
    static, running = run("static_batch.py", *arguments), run("rebatching.py", *arguments)
    assert (static.returncode, running.returncode) == (0, 0), static.stderr + running.stderr
    *answers, steps = static.stdout.splitlines()
    *same, fewer = running.stdout.splitlines()
    assert same == answers and len(answers) == 6
    assert (steps, fewer) == ("57 decode steps", "40 decode steps")
    changes = list(difflib.ndiff(code_lines("static_batch.py"), code_lines("rebatching.py")))
    added = [line for line in changes if line[0] == "+"]
    assert 0 < len(added) <= 10 and not any(line[0] == "-" for line in changes)
    shown = (FOLDER.parent / "docs" / "huggingface.md").read_text()
    assert "\n".join(added) in shown
