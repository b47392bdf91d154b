"""Two replicas behind OpenAI's interface, one of them killed while both answer: no request is lost,
no stream has a gap, and every answer is that of a single relay."""

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import ray
from processes import children, wait_until
from ray import serve
from tiny_model import save_tiny_model

from baton_engines import Relay, load_model
from baton_engines.serve.on_ray import deployment

CAPACITY = 512
REQUESTS = 12


@pytest.fixture
def url(tmp_path):
    before = children()
    save_tiny_model(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        replicas = {"num_cpus": 0.1}
        application = deployment(
            str(tmp_path), name="tiny", capacity=CAPACITY, num_slots=3, num_replicas=2,
            ray_actor_options=replicas,
        )  # fmt: skip
        serve.run(application)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.shutdown()
        ray.shutdown()
    wait_until(lambda: children() <= before, "processes of Ray are left")


def replicas() -> list[psutil.Process]:
    return [one for one in children() if "RelayReplica" in " ".join(one.cmdline())]


def test_a_killed_replica_loses_no_request(url, tmp_path):
    model, tokenizer = load_model(tmp_path)
    with Relay(model, 4, CAPACITY, tokenizer=tokenizer) as relay:
        expected = [
            relay.submit(
                tokenizer.encode(f"prompt {number}"), max_new_tokens=300, eos=None,
                temperature=0.8, seed=number,
            )
            for number in range(REQUESTS)
        ]  # fmt: skip
        relay.run()
    streams = threading.Semaphore(0)
    # A client that repeated a request would hide that it was lost.
    client = openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=120)

    def ask(number: int) -> str:
        settings = {
            "model": "tiny", "prompt": f"prompt {number}", "max_tokens": 300, "temperature": 0.8,
            "seed": number, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        if number % 2:
            return client.completions.create(**settings).choices[0].text
        parts = []
        for part in client.completions.create(**settings, stream=True):
            parts.append(part.choices[0].text)
            if len(parts) == 5:
                streams.release()
        return "".join(parts)

    assert len(replicas()) == 2
    with client, ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(ask, number) for number in range(REQUESTS)]
        # In the middle of streams.
        for _ in range(3):
            assert streams.acquire(timeout=60)
        replicas()[0].send_signal(signal.SIGKILL)
        texts = [one.result() for one in asked]
    assert texts == [query.text for query in expected]
