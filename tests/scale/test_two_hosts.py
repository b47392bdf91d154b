"""Prompts computed on one host and decoded on another: same bits over the network, and what happens
when the link between them is cut for a moment, or for so long that the host counts as lost."""

import functools
import threading
import time
from collections.abc import Iterator

import hosts
import pytest
import relay_checks
import torch
from processes import alive, wait_until
from relay_checks import assert_empty, assert_right

from baton_engines.prefill.ray import Remote
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama
from baton_engines.testing.prefill import ProcessFault
from baton_engines.testing.small_llama import VOCAB_SIZE, small_llama

# The ids above these are the first tokens of ProcessFault.
prompt = functools.partial(relay_checks.prompt, vocab_size=40)


@pytest.fixture(scope="module")
def pair() -> Iterator[hosts.Hosts]:
    with hosts.two_hosts() as pair:
        yield pair


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    try:
        hosts.Hosts().close()
    except hosts.CannotMakeHostsError as error:
        pytest.skip(f"needs network namespaces, which root can make: {error}")


def remote() -> Remote:
    # On a busy machine an actor takes minutes to import torch.
    return Remote(always=True, workers=2, num_cpus=0, resources={"prefill": 1}, start_timeout=400)


def test_bits_are_those_of_one_host(pair):
    """Logits in bfloat16; some of the keys and values take megabytes."""
    model = small_llama(dtype=torch.bfloat16)
    prompts = [relay_checks.prompt(length, 1, VOCAB_SIZE) for length in (3, 2500, 14, 4000, 1)]

    def run(prefill):
        logits: dict[int, list[torch.Tensor]] = {}
        with Relay(model, 3, 4096, prefill=prefill) as relay:
            relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(
                row.clone()
            )
            queries = [relay.submit(ids, max_new_tokens=5) for ids in prompts]
            relay.run()
            processes = pair.processes(1)
            return [torch.stack(logits[query.id]) for query in queries], relay.counters, processes

    expected, _, _ = run("serial")
    away, before = remote(), pair.received_bytes()
    found, counters, processes = run(away)
    assert counters.prefills_elsewhere == len(prompts) and counters.prefill_faults == 0
    assert all(map(torch.equal, found, expected))
    assert {*away.process_ids} <= processes
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # Two bytes per number.
    assert pair.received_bytes() - before > 2 * numbers * sum(map(len, prompts))
    wait_until(lambda: not any(map(alive, away.process_ids)), "an actor is left")


def test_the_link_is_cut_for_a_moment_and_for_long(pair, tmp_path):
    """An answer that is late because of a short cut counts as no fault. During a long one the loop
    computes all prompts, including those in progress on the other host. Ray gives that host up: its
    processes end when they learn of it, and it takes prompts again once it has joined anew."""
    model = FakeLlama()
    model.fault = ProcessFault(tmp_path / "begun")
    with Relay(model, 3, 5000, prefill=remote()) as relay:
        prefiller = relay._loop.in_flight.prefiller
        processes = prefiller.process_ids
        queries = []

        def submit(*first: int, length: int = 4, new_tokens: int = 4) -> None:
            ids = [*first, *prompt(length, len(queries))]
            queries.append(relay.submit(ids, max_new_tokens=new_tokens))

        def submit_and_cut_in_the_middle() -> None:
            # While a query decodes, a step waits for no prompt.
            submit(new_tokens=90)
            relay.step()
            # The long prompt's keys and values will be in the other host's store.
            (tmp_path / "begun").unlink(missing_ok=True)
            submit(ProcessFault.PAUSE, length=4000)
            submit(ProcessFault.PAUSE)
            relay.step()
            wait_until((tmp_path / "begun").exists, "no actor computes")
            pair.cut()

        submit_and_cut_in_the_middle()
        threading.Timer(1.2, pair.join).start()
        relay.run()
        assert (relay.counters.prefills_elsewhere, relay.counters.prefill_faults) == (3, 0)

        submit_and_cut_in_the_middle()
        relay.run()
        submit()
        relay.run()
        assert (relay.counters.prefills_elsewhere, relay.counters.prefill_faults) == (4, 3)
        assert_right(model, queries)

        pair.join()
        pair.wait_until_empty(1)
        assert not any(map(alive, processes))
        pair.start(1)
        deadline = time.monotonic() + 60
        while relay.counters.prefills_elsewhere == 4:
            assert time.monotonic() < deadline, "the host takes no prompt"
            time.sleep(0.5)
            submit()
            relay.run()
        assert_right(model, queries)
        assert_empty(relay)
