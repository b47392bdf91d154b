"""The auditor: what it finds in engines that are exact, that are not, and that fail."""

import dataclasses
import http.server
import itertools
import json
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from baton_engines import Relay
from baton_engines.cli.main import app
from baton_engines.invariance import (
    Answer,
    Request,
    TargetError,
    UnsupportedError,
    audit,
    make_axes,
)
from baton_engines.invariance.audit import compare
from baton_engines.invariance.generate_target import GenerateTarget
from baton_engines.invariance.openai_target import OpenAITarget
from baton_engines.invariance.relay_target import RelayTarget
from baton_engines.testing.small_llama import small_llama

PROMPTS = ("one two", "three", "four five six")
MAX_TOKENS = 4
AXES = (
    "alone, again",
    "batch of 2",
    "batch of 3",
    "other order",
    "long neighbor",
    "shared beginning",
    "arriving late",
    "cancelled neighbors",
)


def axes(prompts=PROMPTS, max_tokens=MAX_TOKENS):
    return make_axes(prompts, max_tokens=max_tokens, batch_sizes=(2, 3), long_words=12)


def findings(target, prompts=PROMPTS, max_tokens=MAX_TOKENS):
    found = audit(target, prompts, axes(prompts, max_tokens), max_tokens=max_tokens)
    return {result.name: result for result in found}


def encode(text):
    return [ord(character) % 90 + 3 for character in text]


class Exact:
    """An engine whose answers depend on the prompt only."""

    name = "exact"

    def ask(self, requests):
        return [self.answer(request, requests) for request in requests]

    def answer(self, request, requests):
        tokens = tuple(encode(request.prompt)[:1] * request.max_tokens)
        return Answer(tokens, tuple(-0.5 for _ in tokens))


# The axes.


def test_every_prompt_is_watched_once_per_axis():
    made = axes()
    assert tuple(axis.name for axis in made) == AXES
    for axis in made:
        watched = [
            (prompt, request.prompt)
            for batch in axis.batches
            for prompt, request in zip(batch.watched, batch.requests, strict=True)
            if prompt is not None
        ]
        assert sorted(watched) == list(enumerate(PROMPTS)), axis.name


def test_what_each_axis_does():
    made = {axis.name: axis.batches for axis in axes()}
    assert {len(batch.requests) for batch in made["batch of 2"]} == {2}
    assert [r.prompt for r in made["other order"][0].requests] == list(PROMPTS[::-1])
    assert len(made["long neighbor"][0].requests[0].prompt.split()) == 12
    before, together = made["shared beginning"][:2]
    assert all(r.prompt.startswith(PROMPTS[0]) for r in (*before.requests, *together.requests))
    assert [r.after for r in made["arriving late"][0].requests] == [0, 2, 2]
    assert [r.cancel_after for r in made["cancelled neighbors"][0].requests] == [1, 2, 3, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "prompts must not be empty"),
        ({"batch_sizes": (4,)}, "batch_sizes must be from 2 to 3, the number of prompts, got 4"),
        ({"batch_sizes": (1,)}, "got 1"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"long_words": 0}, "long_words must be >= 1, got 0"),
    ],
)
def test_bad_axes(change, message):
    arguments = {"prompts": PROMPTS, "max_tokens": 4, "batch_sizes": (2,), "long_words": 9}
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        make_axes(arguments.pop("prompts"), **arguments)


# The comparison.


def test_compare_by_hand():
    reference = Answer((5, 6, 7), (-1.0, -2.0, -3.0))
    assert compare(0, reference, reference).equal
    other = compare(0, reference, Answer((5, 6, 8), (-1.0, -2.25, -3.0)))
    assert (other.first_difference, other.largest_gap, other.equal) == (2, 0.25, False)
    shorter = compare(0, reference, Answer((5, 6), (-1.0, -2.0)))
    assert (shorter.first_difference, shorter.largest_gap, shorter.equal) == (2, 0.0, False)
    bits = compare(0, reference, Answer((5, 6, 7), (-1.0, -2.0, -3.0000002)))
    assert bits.first_difference is None and not bits.equal
    silent = compare(0, Answer((5,), ()), Answer((5,), ()))
    assert silent.equal and silent.largest_gap is None


def test_an_exact_engine_has_no_finding():
    found = findings(Exact())
    assert tuple(found) == AXES
    assert all(result.equal == len(PROMPTS) for result in found.values())


class ByBatchSize(Exact):
    def answer(self, request, requests):
        answer = super().answer(request, requests)
        gap = len(requests) * 2.0**-20 if len(requests) > 1 else 0.0
        return dataclasses.replace(answer, logprobs=tuple(p - gap for p in answer.logprobs))


class ByLongestNeighbor(Exact):
    def answer(self, request, requests):
        answer = super().answer(request, requests)
        if max(len(other.prompt) for other in requests) > 40:
            return dataclasses.replace(answer, tokens=(*answer.tokens[:-1], 99))
        return answer


class ByCancellation(Exact):
    def answer(self, request, requests):
        answer = super().answer(request, requests)
        if any(other.cancel_after is not None for other in requests):
            return dataclasses.replace(answer, tokens=(99, *answer.tokens[1:]))
        return answer


class ByRepetition(Exact):
    def __init__(self):
        self.seen = set()

    def answer(self, request, requests):
        answer = super().answer(request, requests)
        if any(request.prompt.startswith(prompt[:3]) for prompt in self.seen):
            answer = dataclasses.replace(answer, logprobs=tuple(p - 0.5 for p in answer.logprobs))
        self.seen.add(request.prompt)
        return answer


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (ByBatchSize, set(AXES) - {"alone, again"}),
        (ByLongestNeighbor, {"long neighbor", "cancelled neighbors"}),
        (ByCancellation, {"cancelled neighbors"}),
        (ByRepetition, set(AXES)),
    ],
)
def test_each_dependence_is_found_on_its_axes(target, named):
    found = findings(target())
    assert {name for name, result in found.items() if result.equal < len(PROMPTS)} == named


def test_what_an_engine_cannot_do_is_said():
    class Fixed(Exact):
        def answer(self, request, requests):
            if request.after:
                raise UnsupportedError("no latecomers")
            return super().answer(request, requests)

    found = findings(Fixed())
    assert found["arriving late"].unsupported == "no latecomers"
    assert not found["arriving late"].findings
    assert found["cancelled neighbors"].equal == len(PROMPTS)


def test_an_empty_answer_is_an_error():
    class Silent(Exact):
        def answer(self, request, requests):
            return Answer((), ())

    with pytest.raises(TargetError, match="no token in the answer to 'one two'"):
        findings(Silent())


# Targets in this process.


def test_the_relay_is_exact_on_all_axes():
    with Relay(small_llama(dtype=torch.bfloat16), num_slots=3, capacity=120) as relay:
        found = findings(RelayTarget(relay, encode))
    assert tuple(found) == AXES
    for result in found.values():
        assert result.unsupported is None and result.equal == len(PROMPTS), result.name
        assert all(finding.largest_gap == 0.0 for finding in result.findings)


def test_late_and_cancelled_requests_of_the_relay():
    with Relay(small_llama(), num_slots=3, capacity=64) as relay:
        target = RelayTarget(relay, encode)
        whole, cut, late = target.ask(
            [
                Request("one", 8),
                Request("two", 8, cancel_after=2),
                Request("three", 3, after=1),
            ]
        )
        assert (len(whole.tokens), len(whole.logprobs)) == (8, 8)
        assert 2 <= len(cut.tokens) < 8 and len(late.tokens) == 3


def test_a_query_that_fails_is_named():
    with (
        Relay(small_llama(), num_slots=1, capacity=8) as relay,
        pytest.raises(TargetError, match="relay: .*capacity"),
    ):
        RelayTarget(relay, encode).ask([Request("a prompt that is too long", 4)])


def test_generate_is_a_target():
    model = small_llama(dtype=torch.bfloat16, max_position_embeddings=120)
    target = GenerateTarget(model, encode)
    found = findings(target)
    assert found["alone, again"].equal == len(PROMPTS)
    assert found["arriving late"].unsupported == "a batch of generate is fixed"
    (answer,) = target.ask([Request("one two", 3)])
    ids = torch.tensor([[*encode("one two"), *answer.tokens]])
    logits = model(ids).logits[0, -4:-1].float().log_softmax(-1)
    expected = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=0.05)


def test_generate_stops_at_the_end_of_an_answer():
    model = small_llama()
    target = GenerateTarget(model, encode)
    (whole,) = target.ask([Request("one", 6)])
    model.generation_config.eos_token_id = whole.tokens[2]
    (cut,) = target.ask([Request("one", 6)])
    assert cut.tokens == whole.tokens[: whole.tokens.index(whole.tokens[2]) + 1]


# A server.


@contextmanager
def server(respond):
    """A server with OpenAI's interface; `respond(path, body)` yields the contents of its events."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, self.headers.get("Authorization")))
            try:
                events = respond(self.path, body)
                first = next(events)
            except PermissionError:
                self.send_error(401, "no key")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for event in itertools.chain((first,), events):
                text = event if isinstance(event, str) else json.dumps(event)
                try:
                    self.wfile.write(f"data: {text}\n\n".encode())
                    self.wfile.flush()
                except OSError:
                    seen.append(("closed", body, None))
                    return

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", seen
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def completions(path, body):
    for number in range(body["max_tokens"]):
        entry = {"tokens": [f"{body['prompt'][0]}{number}"], "token_logprobs": [-0.125 * number]}
        yield {"choices": [{"text": entry["tokens"][0], "logprobs": entry}]}
    yield "[DONE]"


def test_a_server_is_asked_and_understood():
    with server(completions) as (url, seen):
        target = OpenAITarget(url + "/", "m", key="secret")
        answers = target.ask([Request("ab", 2), Request("cd", 3, after=1)])
        assert answers == [
            Answer(("a0", "a1"), (0.0, -0.125)),
            Answer(("c0", "c1", "c2"), (0.0, -0.125, -0.25)),
        ]
        path, body, key = seen[0]
        assert (path, key) == ("/v1/completions", "Bearer secret")
        assert (body["model"], body["temperature"], body["stream"]) == ("m", 0, True)
        found = findings(OpenAITarget(url, "m"))
        assert all(result.equal == len(PROMPTS) for result in found.values())


def test_a_chat_server_and_one_without_log_probabilities():
    def chat(path, body):
        assert path == "/v1/chat/completions"
        assert body["messages"] == [{"role": "user", "content": "ab"}]
        yield {"choices": [{"delta": {"role": "assistant"}}]}
        content = [{"token": "x", "logprob": -0.5}]
        yield {"choices": [{"delta": {"content": "x"}, "logprobs": {"content": content}}]}
        yield "[DONE]"

    def silent(path, body):
        yield {"choices": [{"text": "x"}]}
        yield {"choices": []}
        yield "[DONE]"

    with server(chat) as (url, _):
        asked = OpenAITarget(url, "m", api="chat").ask([Request("ab", 2)])
        assert asked == [Answer(("x",), (-0.5,))]
    with server(silent) as (url, _):
        assert OpenAITarget(url, "m").ask([Request("ab", 2)]) == [Answer(("x",), ())]


def test_a_cancelled_request_closes_its_connection():
    def endless(path, body):
        for number in range(100_000):
            time.sleep(0.001)
            yield {"choices": [{"text": str(number)}]}

    with server(endless) as (url, seen):
        (answer,) = OpenAITarget(url, "m").ask([Request("ab", 8, cancel_after=2)])
        assert answer.tokens == ("0", "1")
        deadline = time.monotonic() + 20
        while seen[-1][0] != "closed" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen[-1][0] == "closed"


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (["no JSON"], "an event is not JSON: 'no JSON'"),
        (["[1]"], "an event is not an object"),
        ([{"error": {"message": "out of memory"}}], "out of memory"),
    ],
)
def test_what_a_server_says_wrong(events, message):
    with (
        server(lambda path, body: iter(events)) as (url, _),
        pytest.raises(TargetError, match=message.replace("[", r"\[")),
    ):
        OpenAITarget(url, "m").ask([Request("ab", 2)])


def test_a_server_that_refuses_or_is_not_there():
    def refuse(path, body):
        raise PermissionError
        yield

    with server(refuse) as (url, _), pytest.raises(TargetError, match="HTTP 401"):
        OpenAITarget(url, "m").ask([Request("ab", 2)])
    with pytest.raises(TargetError, match="127.0.0.1:9"):
        OpenAITarget("http://127.0.0.1:9/v1", "m").ask([Request("ab", 2)])


# The command.


def test_the_command_shows_a_table_a_picture_and_json(tmp_path):
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    with server(completions) as (url, _):
        arguments = ["invariance", "--url", url, "--model", "m", "--max-new-tokens", "2"]
        arguments += ["--prompt", "ab", "--prompt", "cd", "--output", str(output)]
        result = CliRunner().invoke(app, [*arguments, "--picture", str(picture)])
    assert result.exit_code == 0, result.stderr
    assert "2 of 2" in result.stdout and "shared beginning" in result.stdout
    found = json.loads(output.read_text())
    assert [axis["equal"] for axis in found["axes"]] == [2] * len(found["axes"])
    assert picture.stat().st_size > 5_000


def test_the_command_fails_when_bits_differ(tmp_path):
    calls = []

    def wandering(path, body):
        calls.append(body)
        entry = {"tokens": ["x"], "token_logprobs": [-0.5 - 0.001 * len(calls)]}
        yield {"choices": [{"text": "x", "logprobs": entry}]}
        yield "[DONE]"

    with server(wandering) as (url, _):
        arguments = ["invariance", "--url", url, "--model", "m", "--prompt", "a", "--prompt", "b"]
        result = CliRunner().invoke(app, [*arguments, "--picture", str(tmp_path / "found.svg")])
    assert result.exit_code == 1
    assert "0 of 2" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--url", "http://127.0.0.1:9/v1", "--prompt", "a", "--prompt", "b"], 1, "127.0.0.1:9"),
        (["--prompt", "a", "--batch-size", "2"], 2, "batch_sizes must be from 2 to 1"),
        (["--attention", "sdpa"], 2, "--attention needs --engine generate or vllm"),
        (["--picture", "found.gif"], 2, "must end in"),
    ],
)
def test_usage_errors_of_the_command(arguments, code, message):
    result = CliRunner().invoke(app, ["invariance", *arguments])
    assert result.exit_code == code
    said = " ".join(result.stderr.replace("│", " ").split())
    assert message in said and "unexpected" not in said
