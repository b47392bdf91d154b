"""A relay behind OpenAI's interface, used through OpenAI's own client on the loopback: the relay's
answers, errors of the interface, clients that disconnect, and shutting down."""

import asyncio
import copy
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import uvicorn
from processes import wait_until
from tiny_model import byte_tokenizer, save_tiny_model

from baton_engines import Relay, load_model
from baton_engines.serve import BadRequestError, Engine
from baton_engines.serve.app import make_app
from baton_engines.testing import FakeLlama

CAPACITY = 256
MESSAGES = [{"role": "user", "content": "hello"}]


class Served:
    """The tiny model on a free port."""

    def __init__(self, folder):
        self.model, self.tokenizer = load_model(folder)
        self.engine = Engine(lambda: Relay(self.model, 3, CAPACITY, tokenizer=self.tokenizer))
        app = make_app(self.engine, copy.deepcopy(self.tokenizer), "tiny", CAPACITY)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started, "the server does not start")
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()

    def expected(self, prompt: str, **options):
        """The query that a separate relay makes of a prompt."""
        with Relay(self.model, 1, CAPACITY, tokenizer=self.tokenizer) as relay:
            query = relay.submit(self.tokenizer.encode(prompt), **options)
            relay.run()
        return query


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    served = Served(save_tiny_model(tmp_path_factory.mktemp("tiny")))
    yield served
    served.close()


def test_many_at_once_have_the_answers_of_a_relay(served):
    """Whole and streamed, greedy and sampled, more requests than there are slots."""

    def ask(number: int) -> str:
        settings = {"prompt": f"prompt {number}", "max_tokens": 5 + number, "model": "tiny"}
        if number % 3 == 0:
            settings |= {"temperature": 0.9, "seed": number}
        if number % 2:
            parts = served.client.completions.create(**settings, stream=True)
            return "".join(part.choices[0].text for part in parts)
        return served.client.completions.create(**settings).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(16)))
    for number, text in enumerate(texts):
        options = {"temperature": 0.9, "seed": number} if number % 3 == 0 else {}
        right = served.expected(f"prompt {number}", max_new_tokens=5 + number, **options)
        assert text == right.text
    assert served.engine.num_requests == 0


def test_chat(served):
    prompt = "user:hello\nassistant:"
    right = served.expected(prompt, max_new_tokens=9)
    answer = served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", right.text)
    assert choice.finish_reason == {"eos": "stop"}.get(right.finish_reason, "length")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(right.tokens))
    chunks = list(
        served.client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in chunks[:-1])
    assert text == right.text
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == usage
    # Without a limit, all that fits the capacity.
    unlimited = served.client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"ignore_eos": True}
    )
    assert unlimited.usage.total_tokens == CAPACITY


def test_several_choices_have_seeds_of_their_own(served):
    answer = served.client.completions.create(
        model="tiny", prompt=["one", "two"], n=2, seed=5, temperature=1.0, max_tokens=6
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(
        answer.choices, [("one", 5), ("one", 6), ("two", 5), ("two", 6)], strict=True
    ):
        right = served.expected(prompt, seed=seed, temperature=1.0, max_new_tokens=6)
        assert choice.text == right.text
    assert answer.usage.prompt_tokens == 6


def test_logprobs(served):
    right = served.expected("prompt", max_new_tokens=6, logprobs=2)
    (choice,) = served.client.completions.create(
        model="tiny", prompt="prompt", max_tokens=6, logprobs=2
    ).choices
    assert choice.logprobs.token_logprobs == [one.logprob for one in right.logprobs]
    parts = served.client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=1, stream=True
    )
    given = [one for part in parts for one in (part.choices[0].logprobs or _NONE).content]
    right = served.expected("user:hello\nassistant:", max_new_tokens=6, logprobs=1)
    assert [one.logprob for one in given] == [one.logprob for one in right.logprobs]
    assert [one.top_logprobs[0].logprob for one in given] == [
        one.top[0][1] for one in right.logprobs
    ]


class _NONE:
    content = ()


def test_stop_and_token_ids(served):
    text = served.expected("abc", max_new_tokens=40).text
    stop = next(letter for letter in text[1:] if letter.isascii())
    ids = served.tokenizer.encode("abc")
    (choice,) = served.client.completions.create(
        model="tiny", prompt=ids, max_tokens=40, stop=[stop]
    ).choices
    right = served.expected("abc", max_new_tokens=40, stop=[stop])
    assert choice.text == right.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "token_ids must hold at least one token, got an empty prompt"),
        ({"prompt": []}, "prompt must not be empty"),
        ({"prompt": [300]}, "token_ids must be in the vocabulary"),
        ({"max_tokens": CAPACITY}, "must be at most the capacity 256"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": -1}, "temperature must be finite and >= 0"),
        ({"suffix": "x"}, "suffix must be left out, got 'x'"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "must be of type text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_requests(served, settings, message, stream):
    with pytest.raises(openai.BadRequestError, match=message):
        served.client.completions.create(
            **{"model": "tiny", "prompt": "a", "stream": stream, **settings}
        )


def test_other_errors(served):
    with pytest.raises(openai.NotFoundError, match="model must be 'tiny', got 'other'"):
        served.client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        served.client.chat.completions.create(
            model="tiny", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]
        )
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\] must have a role"):
        served.client.chat.completions.create(model="tiny", messages=[{"role": "user"}])
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert httpx2.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_slot(served, stream):
    """Before any text has arrived, and in the middle of a stream."""
    endless = {"model": "tiny", "max_tokens": CAPACITY - 1, "extra_body": {"ignore_eos": True}}
    release = threading.Event()
    # The relay stands still meanwhile.
    served.engine._calls.put(lambda relay: release.wait())
    clients = [
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0, timeout=1)
        for _ in range(4)
    ]

    def ask(client):
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**endless, prompt="a", stream=stream)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, client) for client in clients]
        for one in asked:
            one.result()
    release.set()
    wait_until(lambda: served.engine.num_requests == 0, "a client that left has a query")
    for client in clients:
        client.close()
    if stream:
        parts = served.client.completions.create(**endless, prompt="a", stream=True)
        next(iter(parts))
        assert served.engine.num_requests == 1
        parts.close()
        wait_until(lambda: served.engine.num_requests == 0, "a client that left has a query")


def test_an_engine_whose_relay_fails_says_so():
    model, tokenizer = FakeLlama(vocab_size=257), byte_tokenizer()

    def make_relay():
        relay = Relay(model, 2, 32, tokenizer=tokenizer)
        relay.policy.plan = None
        return relay

    async def ask(engine, **options):
        return [piece async for piece in engine.generate([1, 2], max_new_tokens=3, **options)]

    engine = Engine(make_relay)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="relay must run, got TypeError"):
            asyncio.run(ask(engine))
    engine.close()
    with pytest.raises(ZeroDivisionError):
        Engine(lambda: 1 / 0)
    engine = Engine(lambda: Relay(model, 2, 32, tokenizer=tokenizer))
    with pytest.raises(TypeError, match="unexpected"):
        asyncio.run(ask(engine, unexpected=1))
    with pytest.raises(BadRequestError, match="top_p"):
        asyncio.run(ask(engine, top_p=7.0))
    (*_, last) = asyncio.run(ask(engine))
    assert last.finish_reason == "length"
    engine.close()
    with pytest.raises(RuntimeError, match="relay must run, got RuntimeError"):
        asyncio.run(ask(engine))


def test_the_command(tmp_path):
    """In a separate process on a free port, until Ctrl-C."""
    folder = save_tiny_model(tmp_path)
    command = [sys.executable, "-m", "baton_engines.cli", "serve", "--model", str(folder)]
    with subprocess.Popen(
        [*command, "--port", "0", "--slots", "2"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    break
            with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="-", max_retries=0) as client:
                (model,) = client.models.list()
                answer = client.completions.create(model=model.id, prompt="a", max_tokens=3)
            assert model.id == str(folder) and answer.usage.completion_tokens == 3
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, -signal.SIGINT)
            process.stderr.read()
