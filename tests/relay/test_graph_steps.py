"""Decode steps as CUDA graphs: what they request from the device, which graphs exist, what is fixed
in them, and what happens after faults."""

import itertools
import logging

import pytest
import torch
from gpus import needs_gpu
from graph_checks import answers, assert_same_answers, decoding, deltas, ticks
from relay_workload import make_model

from baton_engines.huggingface import AnyModel
from baton_engines.llama import patch_llama
from baton_engines.query.sampler import Sampler
from baton_engines.query.sampling_options import SamplingOptions
from baton_engines.relay import Relay
from baton_engines.relay import graphs as graphs_module
from baton_engines.testing import FakeLlama
from baton_engines.testing.recorded_graphs import RecordedGraphs
from baton_engines.testing.small_llama import small_decoder, small_llama
from baton_kernels.testing import assert_same_bits

# Requests of a step to the device.


def test_a_step_is_one_copy_in_one_replay_one_copy_out_and_one_wait():
    runtime = RecordedGraphs()
    with Relay(small_llama(), 8, 40, cuda_graphs=runtime) as relay:
        decoding(relay, 3)
        relay.step()
        for _ in range(5):
            with runtime.watched() as reads:
                assert deltas(runtime, relay.step) == (1, 1, 1, 1, 0)
            assert reads.found == []


def test_without_graphs_the_host_waits_more_often():
    """Calls that `watched` would find: the launches that a relay without graphs waits for."""
    with Relay(small_llama(), 8, 40) as relay:
        decoding(relay, 3)
        with RecordedGraphs().watched() as reads:
            relay.step()
    assert sorted(reads.found) == ["tensor", "tensor", "tolist"]


def test_drawn_tokens_are_chosen_as_without_graphs():
    runtime = RecordedGraphs()
    with Relay(small_llama(), 8, 40, cuda_graphs=runtime) as relay:
        decoding(relay, 2)
        decoding(relay, 1, temperature=0.7)
        relay.step()
        with runtime.watched() as reads:
            assert deltas(runtime, relay.step) == (1, 1, 1, 1, 0)
        assert "tolist" in reads.found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"temperature": 0.5}, False),
        ({"logprobs": 0}, False),
        ({"suppress_tokens": (3,)}, False),
        # Options without effect on a greedy choice.
        ({"top_k": 3, "top_p": 0.5, "seed": 1}, True),
    ],
)
def test_which_queries_need_the_likeliest_token_only(options, expected):
    assert Sampler(SamplingOptions(**options)).takes_likeliest is expected


def test_steps_with_prompts_are_launched():
    runtime = RecordedGraphs()
    with Relay(small_llama(), 4, 40, "orca", cuda_graphs=runtime) as relay:
        decoding(relay, 2)
        relay.step()
        relay.submit([5, 6, 7], max_new_tokens=4, eos=None)
        assert deltas(runtime, relay.step) == (0, 0, 0, 0, 0)
        # Three rows have a graph of four.
        assert deltas(runtime, relay.step) == (1, 0, 1, 1, 1)
        assert deltas(runtime, relay.step) == (1, 1, 1, 1, 0)


# The graphs that exist.


def test_graphs_come_with_the_sizes_that_need_them():
    rounded = {
        slots: sorted({graphs_module._rounded_rows(n, slots) for n in range(1, slots + 1)})
        for slots in (1, 3, 5, 8, 30)
    }
    assert rounded == {
        1: [1], 3: [1, 2, 3], 5: [1, 2, 4, 5], 8: [1, 2, 4, 8], 30: [1, 2, 4, 8, 16, 24, 30],
    }  # fmt: skip
    for slots in range(1, 70):
        for rows in range(1, slots + 1):
            count = graphs_module._rounded_rows(rows, slots)
            assert rows <= count <= slots and count - rows < max(rows, 8)
    lengths = [graphs_module._rounded_length(n, 5000) for n in (1, 1024, 1025, 2048, 4097, 5000)]
    assert lengths == [1024, 1024, 2048, 2048, 5000, 5000]
    assert graphs_module._rounded_length(7, 40) == 40


def test_a_longer_row_has_a_graph_of_its_own(monkeypatch):
    monkeypatch.setattr(graphs_module, "_LENGTH", 8)
    model = small_llama(max_position_embeddings=64)
    runtime = RecordedGraphs()
    found = answers(model, runtime, count=1, num_slots=1)
    assert_same_answers(found, answers(model, None, count=1, num_slots=1))
    # One token and twelve: up to 8 and 16.
    assert runtime.captures == 2


def test_the_least_recently_used_graph_goes(monkeypatch):
    monkeypatch.setattr(graphs_module, "_MOST_GRAPHS", 1)
    runtime = RecordedGraphs()
    with Relay(small_llama(), 2, 40, cuda_graphs=runtime) as relay:
        decoding(relay, 1)
        relay.step()
        (other,) = decoding(relay, 1, tokens=4)
        while not other.ended:
            relay.step()
        relay.step()
        # One graph of one row, one of two, and one of one row again.
        assert runtime.captures == 3 and len(relay._loop.graphs._graphs) == 1


def test_idle_rows_write_nothing():
    runtime = RecordedGraphs()
    with Relay(small_llama(), 8, 40, cuda_graphs=runtime) as relay:
        queries = decoding(relay, 5)
        relay.cancel(queries[0])
        relay.cancel(queries[2])
        # Three rows have a graph of four.
        relay.step()
        used = {query.slot for query in queries if not query.ended}
        others = [slot for slot in range(8) if slot not in used]
        relay.cache.keys[:, others] = torch.nan
        before = relay.cache.keys.clone()
        assert deltas(runtime, relay.step)[1] == 1
        assert_same_bits(relay.cache.keys[:, others], before[:, others])
        assert not torch.equal(relay.cache.keys[:, [*used]], before[:, [*used]])


# Values that are fixed in a graph.


def test_a_cache_that_moves_is_captured_anew():
    runtime = RecordedGraphs()
    with Relay(small_llama(), 4, 40, cuda_graphs=runtime) as relay:
        decoding(relay, 2)
        relay.step()
        assert deltas(runtime, relay.step) == (1, 1, 1, 1, 0)
        relay.resize(5)
        assert deltas(runtime, relay.step) == (1, 0, 1, 1, 1)
        assert deltas(runtime, relay.step) == (1, 1, 1, 1, 0)


def changed(model, how):
    with torch.no_grad():
        layer = model.model.layers[0]
        if how == "in place":
            layer.mlp.down_proj.weight.mul_(1.5)
        elif how == "projection":
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * 1.5
        elif how == "norm":
            layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 1.5
        elif how == "last norm":
            model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 1.5)
        else:
            model.model.embed_tokens.weight = torch.nn.Parameter(
                model.model.embed_tokens.weight * 1.5
            )


# A graph sees what is written in place; for anything that moves it must be captured again.
CHANGES = {"in place": 0, "projection": 0, "norm": 1, "last norm": 1, "embedding": 1}


@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_change_between_two_steps(how):
    """On the CPU the projections' weights are packed: changes to the model's own are not seen."""

    def run(graphs):
        model = small_llama(max_position_embeddings=64)
        with (
            patch_llama(model, keep_parameters=True) as llama,
            Relay(llama, 2, 40, cuda_graphs=graphs, clock=ticks()) as relay,
        ):
            queries = decoding(relay, 2)
            relay.step()
            relay.step()
            changed(model, how)
            relay.run()
        return [query.tokens for query in queries]

    runtime = RecordedGraphs()
    assert run(runtime) == run(None)
    assert runtime.captures == 1 + CHANGES[how]


def test_addresses_are_of_all_that_a_forward_reads():
    """The inputs of a forward besides its arguments, as the ops see them: every tensor that an op
    reads and none has created."""
    model = small_decoder("Qwen3", head_dim=16, attention_bias=True)
    with patch_llama(model) as llama:
        runtime = RecordedGraphs()
        with Relay(llama, 2, 24, cuda_graphs=runtime) as relay:
            decoding(relay, 2, tokens=9)
            relay.step()
            cache, buffers = relay.cache, relay._loop.graphs._buffers
            own = {
                x.untyped_storage().data_ptr()
                for x in (*vars(buffers).values(), cache.keys, cache.values)
            }
            read = {
                x.data_ptr() for x in runtime.inputs if x.untyped_storage().data_ptr() not in own
            }
            addresses = set(llama.addresses(24))
    assert len(read) > 20
    assert read <= addresses


def test_a_model_that_is_changed_is_refused():
    model = small_llama()
    with (
        patch_llama(model) as llama,
        Relay(llama, 2, 24, cuda_graphs=RecordedGraphs()) as relay,
    ):
        (query,) = decoding(relay, 1)
        relay.step()
        model.model.layers[0].register_forward_hook(lambda *args: None)
        relay.run()
        assert "must be free of forward hooks" in str(query.error)


def test_a_handle_that_is_undone_is_refused():
    llama = patch_llama(small_llama())
    with Relay(llama, 2, 24, cuda_graphs=RecordedGraphs()) as relay:
        (query,) = decoding(relay, 1)
        relay.step()
        llama.undo()
        relay.run()
        assert "the patch was undone" in str(query.error)


# Faults.


def test_a_capture_that_fails_leaves_the_steps_as_they_were(caplog):
    model = small_llama(max_position_embeddings=64)
    runtime = RecordedGraphs()
    runtime.refuses = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        found = answers(model, runtime)
    assert_same_answers(found, answers(model, None))
    assert runtime.captures == 1 and runtime.replays == found[2] == 0
    assert "go on without CUDA graphs" in caplog.text


def test_logits_that_are_not_finite_fail_their_query():
    def run(graphs):
        model = small_llama()
        with (
            patch_llama(model, keep_parameters=True) as llama,
            Relay(llama, 3, 24, cuda_graphs=graphs, clock=ticks()) as relay,
        ):
            queries = decoding(relay, 3, tokens=8)
            relay.step()
            row = queries[1].tokens[-1]
            assert row not in (queries[0].tokens[-1], queries[2].tokens[-1])
            with torch.no_grad():
                model.model.embed_tokens.weight[row] = torch.nan
            relay.step()
            return [(query.status, str(query.error), query.tokens) for query in queries]

    found = run(RecordedGraphs())
    assert found == run(None)
    assert [status for status, *_ in found] == ["running", "failed", "running"]
    assert "logits of query 1 must be finite" in found[1][1]


def test_an_interrupted_step_is_computed_again():
    model = small_llama(max_position_embeddings=64)
    expected = answers(model, None, count=3)
    runtime = RecordedGraphs()
    wait, calls = runtime.wait, itertools.count()

    def interrupted():
        if next(calls) % 5 == 3:
            raise KeyboardInterrupt
        wait()

    runtime.wait = interrupted
    logits = {}
    with Relay(model, 4, 60, cuda_graphs=runtime, clock=ticks()) as relay:
        relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(row)
        queries = [
            relay.submit([3 * n + 1, *range(n)], max_new_tokens=12 + 5 * n, eos=None)
            for n in range(3)
        ]
        interrupts = 0
        while any(not query.ended for query in queries):
            try:
                relay.step()
            except KeyboardInterrupt:
                interrupts += 1
    assert interrupts > 3
    assert_same_answers(([query.tokens for query in queries], logits), expected)


def test_buffers_of_an_interrupted_step_are_left_alone(monkeypatch, caplog):
    """The device may still be copying them when the next, different step comes."""
    runtime = RecordedGraphs()
    with Relay(small_llama(), 4, 40, cuda_graphs=runtime) as relay:
        queries = decoding(relay, 3)
        relay.step()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runtime, "wait", interrupt)
            relay.step()
        relay.cancel(queries[1])
        with caplog.at_level(logging.INFO):
            relay.step()
        # Otherwise it would have been computed without graphs.
        assert "failed" not in caplog.text and runtime.captures == 2


def interrupt():
    raise KeyboardInterrupt


def test_a_model_that_raises_fails_its_queries_only():
    with patch_llama(small_llama()) as llama:
        runtime = RecordedGraphs()
        with Relay(llama, 2, 24, cuda_graphs=runtime) as relay:
            (query,) = decoding(relay, 1)
            relay.step()
            forward, llama.forward = llama.forward, None
            addresses, llama.addresses = llama.addresses, None
            relay.step()
            assert query.status == "failed"
            llama.forward, llama.addresses = forward, addresses
            (other,) = decoding(relay, 1, tokens=5)
            relay.run()
            assert other.status == "finished"


def test_a_closed_relay_holds_no_graph():
    relay = Relay(small_llama(), 2, 24, cuda_graphs=RecordedGraphs())
    decoding(relay, 2)
    relay.step()
    graphs = relay._loop.graphs
    assert graphs._graphs and graphs._buffers is not None
    relay.close()
    assert not graphs._graphs and graphs._buffers is None


# The option.


def test_without_a_gpu_the_default_is_no_graphs():
    for wanted in (None, False):
        with Relay(small_llama(), 2, 24, cuda_graphs=wanted) as relay:
            assert relay._loop.graphs is None


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (small_llama, {"cuda_graphs": True}, ValueError,
         "Relay: cuda_graphs must be False or left out for a model on cpu, got True"),
        (FakeLlama, {"cuda_graphs": RecordedGraphs()}, NotImplementedError,
         "cuda_graphs must be False or left out for a model that runs through FakeLlama"),
        (lambda: AnyModel(small_llama()), {"cuda_graphs": RecordedGraphs()}, NotImplementedError,
         "cuda_graphs must be False or left out for a model that runs through AnyModel"),
        (small_llama,
         {"cuda_graphs": RecordedGraphs(), "aligned": True, "shaping": "concatenate",
          "policy": "orca"},
         ValueError, "cuda_graphs must be False or left out for shaping 'concatenate'"),
        (small_llama, {"cuda_graphs": "yes"}, TypeError,
         "Relay: cuda_graphs must be True, False or None, got 'yes'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        Relay(model(), 2, 24, **options)


# On a GPU.


@needs_gpu
def test_gpu_a_step_waits_only_once():
    with Relay(make_model().to("cuda"), 8, 40) as relay:
        decoding(relay, 3)
        relay.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            relay.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert relay.counters.replayed_steps > 0
