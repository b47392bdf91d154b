"""Every error in a command ends in one line and an exit code, never in a traceback."""

import builtins
import json
import zipfile

import jinja2
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tiny_model import save_tiny_model
from typer.testing import CliRunner

from baton_engines import llama
from baton_engines.cli import generate as generate_module
from baton_engines.cli.main import app
from baton_engines.cli.results_io import FileStream, OutputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def generate(folder, *arguments, **options):
    command = ["generate", "--model", folder, "--max-new-tokens", 2, "-q", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in command], **options)


class PanicException(BaseException):
    """Like the exception of a library written in Rust when it panics: not an Exception."""


def rust_panic() -> BaseException:
    return PanicException("called `Option::unwrap()` on a `None` value")


def made(kind: type) -> BaseException:
    """An error of a class, with the arguments that the class requires."""
    if issubclass(kind, UnicodeError) and kind is not UnicodeError:
        text = "x" if kind is not UnicodeDecodeError else b"x"
        arguments = (
            (text, 0, 1, "bad") if kind is UnicodeTranslateError else ("utf8", text, 0, 1, "bad")
        )
        return kind(*arguments)
    if kind.__name__ == "ExceptionGroup":
        return kind("several", [ValueError("one")])
    return kind("something\nis wrong")


BUILTIN = sorted(
    (
        kind
        for kind in vars(builtins).values()
        if isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, (Warning, BrokenPipeError, StopIteration, StopAsyncIteration))
    ),
    key=lambda kind: kind.__name__,
)
ERRORS = {
    **{kind.__name__: (lambda kind=kind: made(kind)) for kind in BUILTIN},
    "SafetensorError": lambda: SafetensorError("header too large"),
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("17 GiB are not there"),
    "JSONDecodeError": lambda: json.JSONDecodeError("Expecting value", "", 0),
    "TemplateError": lambda: jinja2.TemplateError("unknown tag"),
    "BadZipFile": lambda: zipfile.BadZipFile("not a zip file"),
    "LocalEntryNotFoundError": lambda: LocalEntryNotFoundError("offline"),
    "HFValidationError": lambda: HFValidationError("bad repo id"),
    "HfHubHTTPError": lambda: HfHubHTTPError.__new__(HfHubHTTPError),
    "PanicException": rust_panic,
    "OSError with errno": lambda: OSError(28, "No space left on device", "weights"),
}


def one_line(result, code):
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 10, lines
    assert result.exit_code == code, lines


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_loading(name, folder, monkeypatch):
    def from_pretrained(*_, **__):
        raise ERRORS[name]()

    monkeypatch.setattr(llama.load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    result = generate(folder, "--prompt", "a")
    one_line(result, 2)
    assert ("not enough memory" in result.stderr) == (name == "MemoryError")


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_tokenizing_fail_their_query(name, folder, monkeypatch):
    def encode(self, text, **_):
        if text == "user:bad\nassistant:":
            raise ERRORS[name]()
        return original(self, text, **_)

    kind = "transformers.PreTrainedTokenizerFast"
    from transformers import PreTrainedTokenizerFast

    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(f"{kind}.__call__", encode)
    result = generate(folder, "--prompt", "bad", "--prompt", "good")
    assert result.exit_code == 1 and "Traceback" not in result.output
    bad, good = [json.loads(line) for line in result.stdout.splitlines()]
    assert "cannot be tokenized" in bad["error"] and good["output_tokens"] == 2


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_writing(name, folder, tmp_path, monkeypatch):
    def write(self, line):
        raise ERRORS[name]()

    monkeypatch.setattr(FileStream, "write", write)
    output = tmp_path / "answers.jsonl"
    output.write_text("old\n")
    result = generate(folder, "--prompt", "a", "-o", output)
    memory = name in ("MemoryError", "OutOfMemoryError")
    one_line(result, 2 if memory else 1)
    assert output.read_text() == "old\n" and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_run(name, folder, monkeypatch):
    def run_records(*_, **__):
        raise ERRORS[name]()

    monkeypatch.setattr(generate_module, "run_records", run_records)
    memory = name in ("MemoryError", "OutOfMemoryError")
    one_line(generate(folder, "--prompt", "a"), 2 if memory else 1)


def test_errors_with_a_message_of_ours_say_no_more(folder, monkeypatch):
    def write(self, line):
        raise OutputError("cannot write answers: full")

    monkeypatch.setattr(FileStream, "write", write)
    result = generate(folder, "--prompt", "a", "-o", folder / "answers.jsonl")
    assert result.stderr == "error: cannot write answers: full\n"


def test_a_traceback_is_there_for_those_who_want_one(folder, monkeypatch):
    def run_records(*_, **__):
        raise ZeroDivisionError("why")

    monkeypatch.setattr(generate_module, "run_records", run_records)
    command = ["--traceback", "generate", "--model", str(folder), "--prompt", "a"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ZeroDivisionError)
    # This must not affect the next command of the same process.
    one_line(generate(folder, "--prompt", "a"), 1)


def test_ctrl_c_before_the_run(folder, monkeypatch):
    def from_pretrained(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama.load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    one_line(generate(folder, "--prompt", "a"), 130)


def test_too_little_memory_names_the_options(folder):
    result = generate(folder, "--prompt", "a", "--capacity", 2**31 - 1, "--slots", 2**30)
    one_line(result, 2)
    assert "not enough memory" in result.stderr
    assert "--capacity" in result.stderr and "--slots" in result.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_prompts_in_another_encoding(encoding, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a"}\r\n{"prompt": "b"}\r\n'.encode(encoding))
    for arguments, data in ((["--prompts", path], None), ([], path.read_bytes())):
        result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=data)
        text = " ".join(result.stderr.replace("│", " ").split())
        assert result.exit_code == 2
        assert f"must be encoded in UTF-8, got {encoding[:6].upper()}" in text
