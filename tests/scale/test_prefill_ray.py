"""Prompts that actors of Ray compute: same bits, and what happens when actors die, hang or raise,
when their node disappears, and when an object is lost."""

import functools
import os
import random
import signal
import sys

import pytest
import ray
import relay_checks
import torch
from processes import alive, children, wait_until
from relay_checks import assert_empty, assert_right

from baton_engines import prefill
from baton_engines.prefill.ray import Remote
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama
from baton_engines.testing.prefill import ProcessFault
from baton_engines.testing.small_llama import small_llama

# The ids above these are the first tokens of ProcessFault.
prompt = functools.partial(relay_checks.prompt, vocab_size=40)


def remote(**options) -> Remote:
    """Actors on the other node, which get every prompt."""
    return Remote(**{"always": True, "num_cpus": 0, "resources": {"prefill": 1}, **options})


def prefiller(relay: Relay) -> Remote:
    return relay._loop.in_flight.prefiller


def wait_for_actors(relay: Relay, count: int) -> None:
    """Wait until this many actors are alive and idle."""
    actors = prefiller(relay)._actors

    def live() -> bool:
        with actors._change:
            actors._look_for_lost()
            return len(actors._idle) == count

    wait_until(live, f"{count} actors must live, got {len(actors._idle)}")


def assert_gone(processes: list[int]) -> None:
    wait_until(lambda: not any(map(alive, processes)), f"one of {processes} is still there")


def test_a_relay_starts_ray_and_shuts_it_down(monkeypatch):
    """If the program is not connected to a cluster."""
    before = children()
    started = []

    def init():
        started.append(True)
        original("local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)

    original = ray.init
    monkeypatch.setattr(ray, "init", init)
    model = FakeLlama()
    with Relay(model, 3, 32, prefill="ray") as relay:
        runner = relay.submit(prompt(3), max_new_tokens=9)
        relay.step()
        newcomer = relay.submit(prompt(4), max_new_tokens=3)
        relay.run()
        assert_right(model, [runner, newcomer])
        assert relay.counters.prefills_elsewhere == 1
        assert relay.summary()["prefill"] == "ray"
        # The actor is on this node.
        assert prefiller(relay).host_threads == 1
    assert started == [True] and not ray.is_initialized()
    wait_until(lambda: children() <= before, "processes of Ray are left")


def test_logits_have_the_bits_of_a_prefill_in_the_loop(nodes):
    """A real model in bfloat16, which numpy lacks, with two actors on another node; queries that
    enter, leave and are preempted, and an aligned cache."""
    model = small_llama(dtype=torch.bfloat16)

    def run(prefill, aligned):
        logits: dict[int, list[torch.Tensor]] = {}
        numbers = random.Random(5)
        with Relay(model, 4, 24, aligned=aligned, prefill=prefill) as relay:
            relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(
                row.clone()
            )
            queries = []
            for i in range(18):
                ids = [numbers.randrange(97) for _ in range(numbers.choice([1, 2, 5, 9, 14]))]
                queries.append(relay.submit(ids, max_new_tokens=numbers.randint(1, 9)))
                relay.step()
                if i % 5 == 4 and relay.running:
                    relay.preempt(relay.running[0])
            for query in relay.parked:
                relay.resume(query)
            relay.run()
            assert relay.cache.shape.used == ()
            assert [query.status for query in queries] == ["finished"] * 18
            return [(query.tokens, logits[query.id]) for query in queries], relay.counters

    expected, _ = run("serial", False)
    away = remote(workers=2)
    found, counters = run(away, True)
    assert counters.prefills_elsewhere == 18 and counters.prefill_faults == 0
    for (tokens, rows), (right_tokens, right_rows) in zip(found, expected, strict=True):
        assert tokens == right_tokens
        assert torch.equal(torch.stack(rows), torch.stack(right_rows))
    # For actors on another node, the loop gives up no core.
    assert away.host_threads == 0 and len(away.process_ids) == 2
    assert_gone(away.process_ids)


def test_faults_of_actors_end_no_query(nodes, tmp_path):
    """One is killed while idle; one prompt raises, and one kills every actor that tries it: the
    loop computes them. One hangs, once: another actor computes it. All actors come back."""
    model = FakeLlama()
    model.fault = ProcessFault(tmp_path / "struck")
    with Relay(model, 3, 32, prefill=remote(workers=2, timeout=4)) as relay:
        processes = prefiller(relay).process_ids
        queries = []

        def serve(first=()):
            queries.append(relay.submit([*first, *prompt(4, len(queries))], max_new_tokens=3))
            relay.run()

        os.kill(processes[1], signal.SIGKILL)
        serve()
        serve()
        assert relay.counters.prefills_elsewhere == 2 and relay.counters.prefill_faults == 0
        wait_for_actors(relay, 2)
        serve([ProcessFault.RAISE])
        assert relay.counters.prefill_faults == 1
        wait_for_actors(relay, 2)
        serve([ProcessFault.DIE])
        assert relay.counters.prefill_faults == 2
        wait_for_actors(relay, 2)
        serve([ProcessFault.HANG])
        assert (tmp_path / "struck").exists()
        wait_for_actors(relay, 2)
        serve()
        assert relay.counters.prefill_faults == 2 and relay.counters.prefills_elsewhere == 4
        assert_right(model, queries)
        assert_empty(relay)
    assert_gone(processes)


def test_a_node_goes_and_comes_back(nodes, monkeypatch, tmp_path):
    """While one prompt is being computed there, and keys and values of another have not been
    fetched yet."""
    model = FakeLlama()
    model.fault = ProcessFault(tmp_path / "struck")
    get, asked = ray.get, []

    def get_after_the_node_is_gone(reference, **options):
        asked.append(reference)
        # The second call is the long prompt's: its answer is too large to be sent directly and
        # waits in the node's object store.
        if len(asked) == 2:
            ray.wait([reference], fetch_local=False, timeout=60)
            nodes.remove()
        return get(reference, **options)

    with Relay(model, 3, 5000, prefill=remote(workers=2)) as relay:
        processes = prefiller(relay).process_ids
        # While a query decodes, a step waits for no prompt.
        queries = [relay.submit(prompt(3), max_new_tokens=90)]
        relay.step()
        monkeypatch.setattr(ray, "get", get_after_the_node_is_gone)
        queries.append(relay.submit([ProcessFault.HANG, *prompt(4)], max_new_tokens=3))
        relay.step()
        wait_until((tmp_path / "struck").exists, "no actor computes the prompt that hangs")
        queries.append(relay.submit(prompt(4000), max_new_tokens=3))
        relay.run()
        assert relay.counters.prefill_faults == 2
        assert relay.counters.prefills_elsewhere == 1
        queries.append(relay.submit(prompt(5), max_new_tokens=3))
        relay.run()
        assert relay.counters.prefill_faults == 3
        nodes.add()
        wait_for_actors(relay, 2)
        queries.append(relay.submit(prompt(6), max_new_tokens=3))
        relay.run()
        assert relay.counters.prefills_elsewhere == 2
        assert_right(model, queries)
        assert_empty(relay)
    assert_gone(processes)


def test_close_while_an_actor_is_busy(nodes, tmp_path):
    model = FakeLlama()
    model.fault = ProcessFault(tmp_path / "struck")
    relay = Relay(model, 4, 32, prefill=remote())
    processes = prefiller(relay).process_ids
    runner = relay.submit(prompt(3), max_new_tokens=20)
    relay.step()
    hanging, behind = (relay.submit([i, 1, 2], max_new_tokens=4) for i in (ProcessFault.HANG, 1))
    relay.step()
    wait_until((tmp_path / "struck").exists, "no actor computes the prompt that hangs")
    relay.close()
    assert {runner.status, hanging.status, behind.status} == {"cancelled"}
    assert_gone(processes)
    # Ray belongs to the program and keeps running.
    assert ray.is_initialized()


def test_actors_that_cannot_be_placed_or_have_another_model(nodes, tmp_path):
    with pytest.raises(RuntimeError, match="actor must be ready within 0.5 s, got none: does a"):
        Relay(FakeLlama(), 2, 16, prefill=remote(start_timeout=0.5, resources={"nowhere": 1}))
    small_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must be the relay's, .*num_layers=2.*, got .*=1"):
        Relay(small_llama(), 2, 16, prefill=remote(model=tmp_path))


def test_bad_arguments():
    for name in ("timeout", "start_timeout"):
        with pytest.raises(ValueError, match=f"Remote: {name} must be > 0 seconds, got 0"):
            Remote(**{name: 0})

    class OnGpu:
        device = torch.device("cuda", 1)

    with pytest.raises(NotImplementedError, match="^Remote: model must be on the CPU, got one on"):
        Remote().make_workers(OnGpu(), 1)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "baton_engines.prefill.ray")
    with pytest.raises(ImportError, match="package ray must be installed, got none: pip install"):
        prefill.get("ray")
