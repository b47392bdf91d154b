"""The command line on a tiny random Llama: inputs, outputs, and how it ends."""

import inspect
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny_model import EOS, save_tiny_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import baton_kernels
from baton_engines.cli import report
from baton_engines.cli.main import app
from baton_engines.cli.prompts_io import (
    demo_prompts,
    read_prompt_file,
    read_prompts,
)
from baton_engines.relay import Relay


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def generate(folder, *arguments, **options):
    return run("generate", "--model", folder, "--slots", 3, *arguments, **options)


def lines_of(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# Reading prompts


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "broken', "line 1: not valid JSON"),
        (b"plain text", "line 1: not valid JSON"),
        (b"\xff\xfa", "line 1: not UTF-8"),
        (b"[" * 100_000, "line 1: not valid JSON"),
        (b'["a"]', "line 1: expected a JSON object, got list"),
        (b"{}", "line 1: expected exactly one of prompt, messages or token_ids, got none of them"),
        (b'{"prompt": "a", "token_ids": [1]}', "exactly one of"),
        (b'{"prompt": null}', "exactly one of"),
        (b'{"prompt": 3}', "line 1: prompt must be a string, got 3"),
        (b'{"token_ids": [1, true]}', "token_ids must be a list of integers"),
        (b'{"messages": []}', "messages must be a list of objects with role and content"),
        (b'{"messages": [{"role": "user"}]}', "messages must be"),
        (b'{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens must be an integer, got 1.5"),
        (b'{"prompt": "a", "temperature": "hot"}', 'temperature must be a number, got "hot"'),
        (b'{"prompt": "a", "stop": [1.5]}', "stop must be"),
        (b'{"prompt": "a", "id": [1]}', "id must be a string or an integer"),
    ],
)
def test_a_bad_line_is_a_record_with_an_error(line, message):
    bad, good = read_prompts([line + b"\n", b'{"prompt": "b"}\n'], plain_text=False)
    assert message in bad.error
    assert (bad.id, bad.line) == (1, 1)
    assert (good.id, good.prompt, good.error) == (2, "b", None)


def test_a_good_line():
    line = (
        '\ufeff{"id": "x", "prompt": "é", "max_new_tokens": 3, "temperature": 1, "top_p": 0.5, '
        '"top_k": 4, "seed": 5, "stop": "!", "topic": "accents"}\r\n'
    )
    (record,) = read_prompts([b"", line.encode()][1:], plain_text=False)
    assert (record.id, record.prompt, record.error) == ("x", "é", None)
    assert record.options == {
        "max_new_tokens": 3,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 4,
        "seed": 5,
        "stop": ("!",),
    }
    assert record.unknown_fields == ("topic",)


def test_plain_text_lines_and_blank_ones(tmp_path):
    path = write_lines(tmp_path / "prompts.txt", "first", "", '{"prompt": "second"}', '"quoted"')
    records = read_prompt_file(path)
    assert [(r.id, r.prompt) for r in records] == [(1, "first"), (3, "second"), (4, '"quoted"')]


def test_prompts_of_the_package():
    records = demo_prompts()
    assert len(records) >= 40
    assert len({record.id for record in records}) == len(records)
    assert not [record.error for record in records if record.error]
    assert not [record for record in records if record.unknown_fields]
    limits = [record.options["max_new_tokens"] for record in records]
    assert (min(limits), max(limits)) == (8, 100)


# generate


def test_generate_from_a_file(folder, tmp_path):
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        '{"id": "first", "prompt": "one", "max_new_tokens": 20}',
        "not JSON",
        '{"token_ids": [40, 41, 999]}',
        '{"messages": [{"role": "user", "content": "[bold]two[/]"}], "max_new_tokens": 2}',
        '{"token_ids": []}',
        '{"id": 7, "token_ids": [40, 41, 42]}',
    )
    output, picture = tmp_path / "results.jsonl", tmp_path / "slots.png"
    result = generate(
        folder, "--prompts", prompts, "--output", output, "--timeline", picture,
        "--max-new-tokens", 5, "--token-ids",
    )  # fmt: skip
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "output tokens/s" in result.stderr and "time to first token, p99" in result.stderr
    assert picture.stat().st_size > 10_000
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["id"] for r in results] == ["first", 2, 3, 4, 5, 7]
    assert ["error" in r for r in results] == [False, True, True, False, True, False]
    assert results[1] == {"id": 2, "line": 2, "error": results[1]["error"]}
    assert "line 2: not valid JSON" in results[1]["error"]
    assert "999" in results[2]["error"]

    # Greedy answers are those of generate on the prompt by itself.
    model = LlamaForCausalLM.from_pretrained(folder)
    for index, text in (
        (0, "user:one\nassistant:"),
        (3, "user:[bold]two[/]\nassistant:"),
        (5, None),
    ):
        prompt = list(range(40, 43))
        if text is not None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            prompt = tokenizer(text)["input_ids"]
            assert results[index]["prompt_tokens"] == len(prompt)
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=(20, None, None, 2, None, 5)[index],
            do_sample=False,
            pad_token_id=EOS,
        )[0, len(prompt) :]
        assert results[index]["token_ids"] == expected.tolist()
        assert results[index]["output_tokens"] == len(expected)


def test_policies_give_the_same_file(folder, tmp_path):
    texts = [part for i in range(8) for part in ("--prompt", "word " * i + "end")]
    texts += ["--max-new-tokens", 6, "--temperature", 1.0]
    # A budget of 81 tokens of 512 bytes, for prompts of up to 54.
    first, *others = (
        generate(folder, *texts, *arguments)
        for arguments in (
            ["--policy", "baton"],
            ["--policy", "baton", "--max-stall-tokens", 5, "--max-slots", 6],
            ["--policy", "chunked", "--token-budget", 8, "--admission", "priority"],
            ["--policy", "orca", "--kv-budget", 0.04],
            ["--policy", "padded_orca", "--admission", "shortest"],
            ["--policy", "multi_bin", "--bins", 2],
            ["--policy", "run_to_completion", "--admission", "length_aware"],
        )
    )
    assert first.exit_code == 0, first.stderr
    assert [r["id"] for r in lines_of(first)] == list(range(1, 9))
    for other in others:
        assert (other.exit_code, other.stdout) == (0, first.stdout)


def test_weights_in_int8(folder):
    """Rounded weights work; anything that is not a dtype is rejected before the model is loaded."""
    arguments = ("--prompt", "abc", "--max-new-tokens", 4, "--token-ids")
    (exact,), (rounded,) = (
        lines_of(generate(folder, *arguments, *weights)) for weights in ((), ("--weights", "int8"))
    )
    assert len(rounded["token_ids"]) == 4 and rounded.keys() == exact.keys()
    result = generate("nowhere", *arguments, "--weights", "int4")
    assert result.exit_code == 2 and "int4" in result.output


def test_the_options_reach_the_relay(folder, monkeypatch):
    made = []

    class Recorded(Relay):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("baton_engines.relay.Relay", Recorded)
    records = '{"prompt": "late"}\n{"prompt": "first", "priority": 2}\n{"prompt": "too long"}\n'
    options = ["--max-slots", 1, "--kv-budget", 0.015, "--max-new-tokens", 3, "--no-chat"]
    options += ["--admission", "priority", "--slots", 1, "--max-stall-tokens", 7]
    result = generate(folder, *options, input=records)
    relay = made[0]
    # 30 tokens of 512 bytes are enough, ten are not for 9 + 3 - 1.
    assert result.exit_code == 0, result.stderr
    assert (relay.policy.max_stall_tokens, relay.policy.admission.name) == (7, "priority")
    assert (relay._batch.slots.kv_budget, relay._loop.autoscale.high) == (15728, 1)
    assert [span.query_id for span in relay.timeline if span.kind == "prefill"] == [1, 0, 2]
    result = generate(
        folder, "--kv-budget", 0.005, "--max-new-tokens", 3, "--no-chat", input="a\nbcdefghij\n"
    )
    assert result.exit_code == 1
    assert "must fit the KV budget of 5242 bytes" in lines_of(result)[1]["error"]


def test_generate_and_serve_make_the_same_relay(folder, monkeypatch):
    """Every option of batching reaches `Relay` from both commands, with a distinct value each."""
    taken = []

    def relay(model, **options):
        taken.append(options)
        raise RuntimeError("enough")

    def serve(model, tokenizer, name, *, host, port, **options):
        relay(model, **options)

    monkeypatch.setattr("baton_engines.relay.Relay", relay)
    monkeypatch.setattr("baton_engines.serve.server.serve", serve)
    options = ["--slots", 3, "--max-slots", 5, "--kv-budget", 1, "--prefix-cache", 2]
    options += ["--capacity", 64, "--weights", "int8", "--prefill", "overlapped"]
    for command in (["generate", "--prompt", "a"], ["serve"]):
        result = run(*command, "--model", folder, *options)
        assert result.exit_code == 2 and "enough" in result.output
    wanted = {
        "num_slots": 3, "max_slots": 5, "kv_budget": 2**20, "prefix_cache": 2 * 2**20,
        "capacity": 64, "weight_dtype": "int8",
    }  # fmt: skip
    for options in taken:
        assert {name: options[name] for name in wanted} == wanted
        assert options["policy"].name == "baton" and options["prefill"].name == "overlapped"
    ours = set(inspect.signature(Relay).parameters) - {"model", "tokenizer", "generation_config"}
    # Shapes that measure other systems' costs are for programs, and so are steps without graphs.
    assert ours - set(taken[1]) <= {"aligned", "shaping", "clock", "cuda_graphs"}, ours


def test_standard_input(folder):
    piped = 'a prompt\n{"id": "b", "prompt": "another", "max_new_tokens": 1}\n'
    for arguments in ([], ["--prompts", "-"]):
        result = generate(folder, *arguments, "--max-new-tokens", 2, "-q", input=piped)
        assert (result.exit_code, result.stderr) == (0, "")
        assert [(r["id"], r["output_tokens"]) for r in lines_of(result)] == [(1, 2), ("b", 1)]


def test_seeds(folder):
    arguments = ["--prompt", "a", "--prompt", "a", "--max-new-tokens", 12, "--temperature", 1.5]
    one, again, other = (
        [r["text"] for r in lines_of(generate(folder, *arguments, "--seed", seed))]
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one[0] != one[1]
    # Query i samples with seed + i.
    assert one[1] == other[0]


def test_no_chat(folder):
    plain = generate(folder, "--prompt", "abc", "--no-chat", "--max-new-tokens", 1)
    assert lines_of(plain)[0]["prompt_tokens"] == 3


def test_unknown_fields_are_named(folder):
    result = generate(folder, "--max-new-tokens", 1, input='{"prompt": "a", "topic": "b"}\n')
    assert result.exit_code == 0
    assert "fields without meaning, ignored: topic" in result.stderr


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"max_tokens": 9', "max_tokens is not supported: use max_new_tokens"),
        ('"tools": [{"type": "function"}]', "tools is not supported"),
        ('"images": ["cat.png"]', "images is not supported"),
        ('"best_of": 3', "best_of is not supported"),
        ('"n": 0', "n must be at least 1, got 0"),
        ('"logit_bias": {"x": 1}', "logit_bias must be an object of token ids and numbers"),
        ('"min_p": 2', "min_p must be in [0, 1], got 2"),
    ],
)
def test_options_that_cannot_be_followed_fail_their_query(folder, field, message):
    lines = f'{{"prompt": "a", {field}}}\n{{"prompt": "b"}}\n'
    result = generate(folder, "--max-new-tokens", 1, input=lines)
    assert result.exit_code == 1
    bad, good = lines_of(result)
    assert message in bad["error"] and good["output_tokens"] == 1


def test_ctrl_c_keeps_what_there_is(folder, tmp_path, monkeypatch):
    updates = []

    def update(self, running, done, rate, slots):
        updates.append(done)
        if len(updates) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(report.RunProgress, "update", update)
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        '{"prompt": "long", "max_new_tokens": 100}',
        '{"prompt": "short", "max_new_tokens": 2}',
        '{"prompt": "long", "max_new_tokens": 100}',
        '{"prompt": "long", "max_new_tokens": 100}',
        '{"prompt": "waiting", "max_new_tokens": 100}',
    )
    handler = signal.getsignal(signal.SIGINT)
    result = generate(folder, "--prompts", prompts)
    assert result.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    results = lines_of(result)
    reasons = ["cancelled", "length", "cancelled", "cancelled", "cancelled"]
    assert [r["finish_reason"] for r in results] == reasons
    assert results[0]["output_tokens"] >= 3
    assert "4 queries were cancelled" in result.stderr


def test_prompts_computed_elsewhere_have_the_same_answers(folder):
    texts = [option for i in range(7) for option in ("--prompt", "ab" * (i + 1))]
    answers = [
        generate(folder, *texts, "--max-new-tokens", 9, "--token-ids", *options)
        for options in ((), ("--prefill", "overlapped", "--prefill-threads", 1))
    ]
    assert [answer.exit_code for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout and len(lines_of(answers[0])) == 7
    assert "slots: prefill elsewhere" in answers[1].stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policy", "fifo"], "must be one of baton, chunked, multi_bin, orca, "),
        (["--prefill", "later"], "must be one of serial, overlapped, apart, ray, got 'later'"),
        (["--prefill-threads", "1"], "--prefill-threads needs --prefill overlapped, apart or ray"),
        (["--policy", "orca", "--bins", 3], "options of orca must be admission, got 'bins'"),
        (["--admission", "last"], "name must be one of fcfs, shortest, length_aware, prio"),
        (["--prompts", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--timeline", "slots.gif"], "must end in .png, .svg, .pdf"),
        (["--timeline", "nowhere/slots.png"], "the folder nowhere does not exist"),
        (["--slots", 0], "--slots"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_options(arguments, message, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    result = run("generate", "--prompt", "a", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_results_never_overwrite_the_prompts(tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", '{"prompt": "a"}')
    result = run("generate", "--prompts", prompts, "--output", prompts)
    assert result.exit_code == 2
    assert prompts.read_text() == '{"prompt": "a"}\n'


def test_no_prompts_need_no_model():
    result = run("generate", "--model", "missing", input="\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no prompts\n")


def test_missing_model():
    result = run("generate", "--model", "./missing", "--prompt", "a")
    assert result.exit_code == 2
    assert "error: load_model: model folder must exist, got ./missing" in result.stderr


def test_help_needs_no_torch():
    # main() sets what OpenMP reads when torch is imported, so it must come first.
    code = "import sys, baton_engines.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# info


def test_info():
    result = run("info")
    assert result.exit_code == 0
    assert "instruction sets" in result.stdout
    assert all(op in result.stdout for op in baton_kernels.build_info()["ops"])


def test_info_tells_a_reason_once(monkeypatch):
    details = {
        "version": "1.0",
        "cpu": {
            "machine": "m", "isa_compiled": ["a", "b"], "isa_found": ["a"], "isa_used": "a",
        },
        "cuda": {"architectures": ["sm_1", "sm_2"], "toolkit": "7.1", "why_not": None},
        "ops": {
            "first": {"cpu": "yes (a)", "cuda": "no: no such device"},
            "second": {"cpu": "no: too old", "cuda": "no: no such device"},
        },
    }  # fmt: skip
    monkeypatch.setattr(baton_kernels, "build_info", lambda: details)
    text = [" ".join(line.split()) for line in run("info").stdout.splitlines()]
    assert "a yes yes yes" in text and "b yes - -" in text
    assert "first yes (a) no [1]" in text and "second no [2] no [1]" in text
    assert text[-2:] == ["[1] no such device", "[2] too old"]
    assert "CUDA kernels sm_1, sm_2 and newer (CUDA 7.1)" in text


def test_info_json():
    details = json.loads(run("info", "--json").stdout)
    assert details["packages"]["transformers"]
    assert details["ops"]["insert_kv"]["cpu"]
