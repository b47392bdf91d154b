"""Any transformers decoder in the relay, compared token by token with eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import MODELS, NEW, expected, generate, make, prompts

from baton_engines import Relay
from baton_engines.huggingface import AnyModel, adapt


@pytest.mark.parametrize("policy", ["baton", "chunked"])
@pytest.mark.parametrize("name", MODELS)
def test_relay_gives_the_tokens_of_eager(name, policy):
    ids, mask = prompts()
    model = make(name)
    with AnyModel(model) as handle, Relay(handle, 4, 64, policy=policy) as relay:
        queries = [
            relay.submit(row[seen.bool()].tolist(), max_new_tokens=NEW)
            for row, seen in zip(ids, mask, strict=True)
        ]
        relay.run()
    assert [query.tokens for query in queries] == expected(name).tolist()


@pytest.mark.parametrize("mode", ["overlapped", "apart"])
def test_prompts_computed_elsewhere(mode):
    ids, mask = prompts()
    with AnyModel(make("qwen3")) as handle, Relay(handle, 2, 64, prefill=mode) as relay:
        queries = [
            relay.submit(row[seen.bool()].tolist(), max_new_tokens=NEW)
            for row, seen in zip(ids, mask, strict=True)
        ]
        relay.run()
    assert [query.tokens for query in queries] == expected("qwen3").tolist()


def test_preempted_and_resumed():
    ids, mask = prompts()
    with AnyModel(make("gemma3")) as handle, Relay(handle, 6, 64) as relay:
        queries = [
            relay.submit(row[seen.bool()].tolist(), max_new_tokens=NEW)
            for row, seen in zip(ids, mask, strict=True)
        ]
        for _ in range(5):
            relay.step()
        assert relay.preempt(queries[2])
        relay.step()
        assert relay.resume(queries[2])
        relay.run()
    assert [query.tokens for query in queries] == expected("gemma3").tolist()


def test_undo_gives_the_attention_back():
    model = make("olmo2")
    model.set_attn_implementation("sdpa")
    handle = AnyModel(model)
    assert model.config._attn_implementation == "baton"
    handle.undo()
    handle.undo()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="undone"):
        handle.forward(None, None, None)


def test_chunked_attention_is_refused():
    model = make("llama4")
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match="AnyModel: layer_types must be .*chunked"):
        AnyModel(model)
    assert model.config._attn_implementation == before


def test_rope_that_depends_on_the_batch_is_refused(monkeypatch):
    model = make("llama")
    monkeypatch.setattr(
        model.config, "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(NotImplementedError, match="rope_type must be .*got dynamic"):
        AnyModel(model)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        AnyModel(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "PatchedLlama"), ("qwen3", "PatchedLlama"), ("mixtral", "AnyModel")],
)
def test_a_relay_takes_any_model(name, kind):
    """The patch where it supports the model, and the model's own code otherwise."""
    ids, mask = prompts()
    model, want = make(name), expected(name)
    model.set_attn_implementation("sdpa")
    with adapt(model) as handle:
        assert type(handle).__name__ == kind
    with Relay(model, 3, 64) as relay:
        queries = [
            relay.submit(row[seen.bool()].tolist(), max_new_tokens=NEW)
            for row, seen in zip(ids, mask, strict=True)
        ]
        relay.run()
    assert [query.tokens for query in queries] == want.tolist()
    assert model.config._attn_implementation == "sdpa"


def test_an_adapted_llama_runs_through_its_own_code():
    """A module that the patch rejects, because it would compute it wrongly, runs its own code."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = copy.deepcopy(make("llama"))
    mlp = model.model.layers[1].mlp
    doubled = Doubled(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
    doubled.load_state_dict(mlp.down_proj.state_dict())
    mlp.down_proj = doubled
    ids, mask = prompts((9, 4))
    want = generate(model, "eager", ids, mask, 8)
    with Relay(model, 2, 32) as relay:
        queries = [
            relay.submit(row[seen.bool()].tolist(), max_new_tokens=8)
            for row, seen in zip(ids, mask, strict=True)
        ]
        relay.run()
    assert [query.tokens for query in queries] == want.tolist()
