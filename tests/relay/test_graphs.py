"""Decode steps as CUDA graphs have the same bits as without graphs, for every policy, option and
kind of model.

Without a GPU `RecordedGraphs` stands in for one: it replays the calls of torch but not the host's
code, and no sooner than the host waits for it.
"""

import pytest
import torch
from gpus import needs_gpu, needs_two_gpus
from graph_checks import answers, assert_nothing_failed, assert_same_answers, ticks
from relay_workload import CAPACITY, Workload, make_model

from baton_engines import policies
from baton_engines.relay import Relay
from baton_engines.testing.prefill import ManualPrefiller
from baton_engines.testing.recorded_graphs import RecordedGraphs
from baton_engines.testing.small_llama import small_decoder, small_llama
from baton_kernels.testing import assert_same_bits

# A whole relay, with graphs and without.


def assert_same_work(one, two):
    assert len(one.queries) == len(two.queries)
    for query, other in zip(one.queries, two.queries, strict=True):
        assert query.prompt == other.prompt and query.status == other.status
        assert query.tokens == other.tokens and query.logprobs == other.logprobs
        pairs = zip(one.logits.get(query.id, []), two.logits.get(other.id, []), strict=True)
        for mine, theirs in pairs:
            assert_same_bits(mine.cpu(), theirs.cpu())


def workload(model, graphs, options, sampling):
    with Relay(model, 5, CAPACITY, cuda_graphs=graphs, clock=ticks(), **options) as relay:
        work = Workload(relay, seed=4, **sampling)
        work.run()
        assert bool(relay.counters.replayed_steps) == bool(graphs)
        if isinstance(graphs, RecordedGraphs):
            assert_nothing_failed(relay, graphs)
    return work


# Fixed costs of a forward: measured times would cut prompts differently.
COSTS = {"costs": lambda work: 1e-3 * (10 + work.tokens)}
RELAYS = {
    **{name: {"policy": name} for name in policies.NAMES if name != "baton"},
    "baton": {},
    "aligned": {"aligned": True},
    "never joined": {"policy": ("baton", {"join": "never"})},
    "autoscaled": {"max_slots": 8},
    "prefix cache": {"prefix_cache": 1 << 20},
    "int8": {"weight_dtype": "int8"},
    "keys in eight bits": {"kv_dtype": "int8"},
    "budget": {"kv_budget": 2 * 80 * 3 * 2 * 2 * 16 * 4},
    "elsewhere": {"prefill": ManualPrefiller},
}
SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_p": 0.9},
    "ruled": {"repetition_penalty": 1.3, "logprobs": 2},
}
CASES = [(name, "greedy") for name in RELAYS] + [("baton", "drawn"), ("baton", "ruled")]


def made(options):
    """Options of one relay; objects that relays must not share are created anew."""
    options = {"policy": ("baton", COSTS), **options}
    if isinstance(options["policy"], tuple):
        name, own = options["policy"]
        options["policy"] = policies.get(name, **own)
    if "prefill" in options and not isinstance(options["prefill"], str):
        options["prefill"] = options["prefill"]()
    return options


@pytest.mark.parametrize(("relay", "sampling"), CASES)
def test_queries_have_the_bits_that_they_have_without_graphs(relay, sampling):
    runtime = RecordedGraphs()
    with_graphs, without = (
        workload(make_model(), graphs, made(RELAYS[relay]), SAMPLING[sampling])
        for graphs in (runtime, None)
    )
    assert runtime.captures > 1 and runtime.replays > 20
    assert_same_work(with_graphs, without)


MODELS = {
    "bfloat16": lambda: small_llama(dtype=torch.bfloat16, max_position_embeddings=64),
    "tied": lambda: small_llama(tie_word_embeddings=True, max_position_embeddings=64),
    "dynamic": lambda: small_llama(rope_type="dynamic"),
    "yarn": lambda: small_llama(rope_type="yarn"),
    "window": lambda: small_decoder("Mistral", sliding_window=7, max_position_embeddings=64),
    "norms of heads": lambda: small_decoder("Qwen3", head_dim=16, max_position_embeddings=64),
    "multipliers": lambda: small_decoder(
        "Granite", max_position_embeddings=64, embedding_multiplier=3.0, residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_bits_that_they_have_without_graphs(name):
    model = MODELS[name]()
    expected = answers(model, None)
    found = answers(model, RecordedGraphs())
    assert_same_answers(found, expected)
    assert found[2] > 20


@pytest.mark.parametrize("prefill", ["overlapped", pytest.param("apart", marks=pytest.mark.slow)])
def test_prompts_computed_elsewhere_change_no_bit(prefill):
    model = small_llama(max_position_embeddings=64)
    found = answers(model, RecordedGraphs(), prefill=prefill)
    assert_same_answers(found, answers(model, None))
    assert found[2] > 10


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=needs_two_gpus)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gpu_queries_have_the_bits_that_they_have_without_graphs(dtype, number):
    model = make_model(dtype).to(torch.device("cuda", number))
    with_graphs, without = (workload(model, graphs, made({}), {}) for graphs in (True, False))
    assert_same_work(with_graphs, without)
