"""Two replicas of a relay on Ray Serve under load, one of which is killed; then autoscaling.

`python -m bench.replicas` starts a Ray cluster on this machine. Clients stream answers through
OpenAI's interface for a minute; halfway, one replica is killed. Clients do not retry. Every answer
is compared with that of a single relay: a failed request, or an answer with a gap, is counted as
lost. Then one replica gets more requests than it has slots until there are two, and none until
there is one again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openai
import psutil
import ray
from ray import serve

from baton_engines import Relay, load_model
from baton_engines.serve.on_ray import RelayReplica, deployment

NAME = "model"


@dataclass
class Answer:
    """One request and its outcome.

    Attributes:
        question: index of the prompt.
        sent: seconds on this process's clock.
        times: when each part of the stream arrived.
        text: all parts.
        error: the error that ended it.
    """

    question: int
    sent: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Question:
    """A prompt, and a single relay's answer to it."""

    prompt: str
    settings: dict[str, Any]
    expected: str


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 if a request was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="folder or hub id; %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load; %(default)s")
    parser.add_argument("--clients", type=int, default=12, help="at a time; %(default)s")
    parser.add_argument("--slots", type=int, default=4, help="of a replica; %(default)s")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer; %(default)s")
    parser.add_argument("--skip-scaling", action="store_true")
    arguments = parser.parse_args(argv)
    questions = make_questions(arguments.model, arguments.tokens)
    with cluster() as url:
        run(arguments, num_replicas=2)
        answers, killed = asyncio.run(
            load(url, questions, arguments.clients, arguments.seconds, kill=True)
        )
        print(report(answers, killed))
        lost = count_lost(answers, questions)
        print(f"\n{len(answers)} requests, {lost} lost\n", flush=True)
        serve.delete("default")
        if not arguments.skip_scaling:
            run(
                arguments,
                autoscaling_config={
                    "min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 2,
                    "downscale_delay_s": 5, "metrics_interval_s": 1, "look_back_period_s": 3,
                },
            )  # fmt: skip
            asyncio.run(scale(url, questions, arguments.slots))
    return int(lost > 0)


def make_questions(model: str, tokens: int, count: int = 8) -> list[Question]:
    """Prompts of a few dozen tokens with sampled answers of equal length."""
    loaded, tokenizer = load_model(model)
    numbers = random.Random(0)
    with Relay(loaded, count, 512, tokenizer=tokenizer) as relay:
        prompts = [
            f"{number}. " + " ".join(str(numbers.randrange(1000)) for _ in range(8))
            for number in range(count)
        ]
        queries = [
            relay.submit(
                tokenizer.encode(prompt), max_new_tokens=tokens, eos=None, temperature=0.8, seed=i
            )
            for i, prompt in enumerate(prompts)
        ]
        relay.run()
        return [
            Question(
                prompt,
                {
                    "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0.8,
                    "seed": i, "extra_body": {"ignore_eos": True},
                },
                query.text,
            )
            for i, (prompt, query) in enumerate(zip(prompts, queries, strict=True))
        ]  # fmt: skip


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Ray and Ray Serve on this machine, and the address of its interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # For machines that start processes slowly: Serve ends a frontend that takes longer.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    ray.init(
        "local", num_cpus=2, object_store_memory=256 << 20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.shutdown()
        ray.shutdown()


def run(arguments: argparse.Namespace, **options: Any) -> None:
    """Deploys, and waits until requests are possible."""
    begin = time.perf_counter()
    serve.run(
        deployment(
            arguments.model, name=NAME, capacity=512, num_slots=arguments.slots,
            # A small number, so that two fit on any machine; each really uses all cores.
            ray_actor_options={"num_cpus": 0.1}, **options,
        )
    )  # fmt: skip
    print(f"deployed in {time.perf_counter() - begin:.0f} s", file=sys.stderr)


def replicas() -> list[psutil.Process]:
    """The processes of the replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if RelayReplica.__name__ in " ".join(process.cmdline()):
                found.append(process)
    return found


def ready_replicas() -> int:
    """How many replicas accept requests."""
    state = serve.status().applications["default"].deployments[RelayReplica.__name__]
    return state.replica_states.get("RUNNING", 0)


async def load(
    url: str, questions: Sequence[Question], clients: int, seconds: float, *, kill: bool
) -> tuple[list[Answer], float | None]:
    """Clients that send one request after another until the time is over; returns their answers,
    and when a replica was killed."""
    answers: list[Answer] = []
    end = time.perf_counter() + seconds
    killed = None
    # A client that retried would hide a lost request.
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=300) as client:

        async def keep_asking(number: int) -> None:
            while time.perf_counter() < end:
                question = (number + len(answers)) % len(questions)
                answers.append(answer := Answer(question, time.perf_counter()))
                await ask(client, questions[question], answer)

        working = asyncio.gather(*(keep_asking(number) for number in range(clients)))
        if kill:
            await asyncio.sleep(seconds / 2)
            killed = time.perf_counter()
            replicas()[0].send_signal(signal.SIGKILL)
        await working
    return answers, killed


async def ask(client: openai.AsyncOpenAI, question: Question, answer: Answer) -> None:
    """Streams one answer, or records the error that ended it."""
    try:
        async for part in await client.completions.create(**question.settings, stream=True):
            if part.choices and part.choices[0].text:
                answer.times.append(time.perf_counter())
                answer.text += part.choices[0].text
    except openai.OpenAIError as error:
        answer.error = f"{type(error).__name__}: {error}"


def count_lost(answers: Sequence[Answer], questions: Sequence[Question]) -> int:
    """The number of requests that failed or whose text is not the relay's; prints each of them."""
    lost = 0
    for answer in answers:
        if answer.error is not None or answer.text != questions[answer.question].expected:
            lost += 1
            print(f"lost: {answer.error or answer.text!r}", file=sys.stderr)
    return lost


def report(answers: Sequence[Answer], killed: float | None) -> str:
    """Latencies in Markdown, in milliseconds: of all requests, and of those in progress when the
    replica was killed."""
    whole = [answer for answer in answers if answer.times]
    rows = {"all": whole}
    if killed is not None:
        rows["in work at the kill"] = [
            answer for answer in whole if answer.sent < killed < answer.times[-1]
        ]
    lines = [
        "| requests | number | ttft p50 | ttft p99 | per token p50 | per token p99 | longest |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, chosen in rows.items():
        if not chosen:
            continue
        first = [answer.times[0] - answer.sent for answer in chosen]
        gaps = np.concatenate([np.diff(answer.times) for answer in chosen])
        cells = [*np.percentile(first, (50, 99)), *np.percentile(gaps, (50, 99)), gaps.max()]
        values = " | ".join(f"{1000 * value:.0f}" for value in cells)
        lines.append(f"| {name} | {len(chosen)} | {values} |")
    return "\n".join(lines)


async def scale(url: str, questions: Sequence[Question], slots: int) -> None:
    """Goes from one replica to two while requests queue, and back when there are none."""
    if ready_replicas() != 1:
        raise RuntimeError(f"bench.replicas: replicas must be 1 at first, got {ready_replicas()}")
    begin = time.perf_counter()
    working = asyncio.create_task(load(url, questions, 4 * slots, 30.0, kill=False))
    up = await wait_for_replicas(2, begin)
    answers, _ = await working
    lost = count_lost(answers, questions)
    down = await wait_for_replicas(1, time.perf_counter())
    print(f"scaling: 1 to 2 replicas {up:.0f} s after {4 * slots} requests at a time began,")
    print(f"2 to 1 {down:.0f} s after they ended; {len(answers)} requests, {lost} lost")


async def wait_for_replicas(count: int, begin: float, limit: float = 300.0) -> float:
    """Seconds since `begin` until `count` replicas are ready.

    Raises:
        TimeoutError: this takes longer than `limit`.
    """
    while (found := await asyncio.to_thread(ready_replicas)) != count:
        if time.perf_counter() - begin > limit:
            raise TimeoutError(f"bench.replicas: replicas must become {count}, got {found}")
        await asyncio.sleep(0.5)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
