"""The demo: counts before figures, and a verdict that other programs cannot change."""

import json
import re

import pytest
from tiny_model import save_tiny_model
from typer.testing import CliRunner

from baton_engines.cli import clocks, demo
from baton_engines.cli.generate import RecordRun
from baton_engines.cli.main import app
from baton_engines.slots import Slots


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def demo_arguments(folder, tmp_path):
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        *(
            json.dumps({"prompt": "word " * (i % 4), "max_new_tokens": 2 + 7 * (i % 3)})
            for i in range(9)
        ),
    )
    output = tmp_path / "out" / "demo"
    return output, [
        "demo", "--model", folder, "--prompts", prompts, "--output-dir", output, "--slots", 3,
    ]  # fmt: skip


def test_demo(folder, tmp_path):
    output, arguments = demo_arguments(folder, tmp_path)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    # An introduction in two sentences comes first.
    assert text.startswith("Two policies answer the same 9 prompts in turns")
    assert text.index("as soon as an answer ends.") < text.index("loading")
    # Then what depends on no clock, and then what does.
    order = [
        "same answers: all",
        "decode steps:",
        "idle slots:",
        "x the output tokens",
        "medians of 3 rounds",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert (output / "timeline.png").stat().st_size > 10_000
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(1, 10))


def test_other_work_does_not_turn_the_verdict(folder, tmp_path, monkeypatch):
    """From some moment on all forwards take three times as long; the figure hardly moves."""
    clock = {}
    compute = Slots.compute

    def computed(self, *arguments, **options):
        clock["now"] += 3.0 if clock["now"] >= clock["busy_after"] else 1.0
        return compute(self, *arguments, **options)

    monkeypatch.setattr(Slots, "compute", computed)
    monkeypatch.setattr(demo, "TURN_TOKENS", 6)
    monkeypatch.setattr(demo, "MOST_SECONDS", 1e9)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: clock["now"])
    found = []
    for busy_after in (1e9, 0.0, 60.0, 130.0, 200.0):
        clock.update(now=0.0, busy_after=busy_after)
        result = run(*demo_arguments(folder, tmp_path)[1])
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        figures = re.search(r"([0-9.]+)x the output .* gave ([0-9.]+)x to ([0-9.]+)x", text)
        middle, low, high = map(float, figures.groups())
        assert 1.0 < low <= middle <= high
        found.append((middle, clock["now"]))
    quiet, seconds = found[0]
    assert 200 < seconds < 300 and quiet > 1.1
    assert all(abs(middle / quiet - 1) < 0.1 for middle, _ in found), found


def test_the_demo_says_that_the_machine_was_busy(folder, tmp_path, monkeypatch):
    for share, said in ((0.4, True), (0.01, False), (None, False)):
        monkeypatch.setattr(demo.OtherWork, "share", lambda self, share=share: share)
        text = " ".join(run(*demo_arguments(folder, tmp_path)[1]).stdout.split())
        assert ("The machine was busy: other programs used 40% of its CPUs" in text) == said


def test_clocks_that_stop():
    watch = clocks.Stopwatch()
    assert watch() == watch() == 0.0
    with watch.running():
        assert watch() > 0.0
    stopped = watch()
    assert watch() == stopped > 0.0
    share = clocks.OtherWork().share()
    assert share is None or 0.0 <= share <= 1.0


def test_demo_fails_when_nothing_can_be_answered(folder, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", '{"token_ids": []}', "[1]")
    result = run("demo", "--model", folder, "--prompts", prompts, "--output-dir", tmp_path)
    assert result.exit_code == 1
    assert "baton: failed: line 2: expected a JSON object, got list" in result.stdout


def test_demo_fails_on_different_answers(folder, tmp_path, monkeypatch):
    class Wrong(RecordRun):
        @property
        def open_queries(self):
            found = super().open_queries
            if not found and self._relay.policy.name == "baton":
                self.outcome.results[4] = {**self.outcome.results[4], "token_ids": [0]}
            return found

    monkeypatch.setattr(demo, "RecordRun", Wrong)
    result = run(*demo_arguments(folder, tmp_path)[1])
    assert result.exit_code == 1
    assert "different answers for 1 of 9: 5" in result.stdout
