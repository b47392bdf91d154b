"""A transformers model whose linear layers are packed, under the model's own code.

| what | compared with |
| --- | --- |
| tokens | eager attention of the plain model, float32, every kind of model |
| memory | storages of the parameters while accelerated |
| undo | the same parameters with the same bits, and the classes' own forwards |
| readers, copies | exact values; a copy is a plain model |
| torch.compile | one graph, the tokens of the uncompiled step |
| refusals | with the reason |
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf_models import MODELS, NEW, expected, generate, make, prompts
from torch import nn

from baton_engines import Relay, patch_llama
from baton_engines.huggingface import accelerate, cache_argument, slot_cache
from baton_engines.testing.small_llama import small_llama
from baton_kernels.testing import assert_same_bits


def copied(name):
    return copy.deepcopy(make(name))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_eager(name):
    model, (ids, mask) = copied(name), prompts()
    with accelerate(model) as handle:
        assert handle.num_packed >= 4 * 4
        cache = slot_cache(model, ids.shape[1] + NEW)
        got = generate(model, "baton", ids, mask, NEW, cache=cache)
    assert torch.equal(got, expected(name))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@torch.no_grad()
def test_undo_gives_everything_back(tied, biases):
    model = small_llama(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(3, 12)[None]
    want = model(ids).logits
    handle = accelerate(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)
    # Norms, biases and the table of an embedding that is not tied.
    kept = [p for n, p in model.named_parameters() if p.untyped_storage().nbytes() > p.itemsize]
    assert all(p.dim() == 1 or p.shape == before["model.embed_tokens.weight"].shape for p in kept)
    assert sum(p.dim() > 1 for p in kept) == (not tied)
    handle.undo()
    handle.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert_same_bits(parameter.data, before[name], name)
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_copies_are_plain_models():
    model = small_llama(tie_word_embeddings=True)
    ids = torch.arange(3, 12)[None]
    want = model(ids).logits
    with accelerate(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert type(other.lm_head.weight) is nn.Parameter
        assert torch.equal(other(ids).logits, want)


@torch.no_grad()
def test_hooks_of_merged_layers_are_called():
    model, seen = small_llama(), []
    ids = torch.arange(3, 12)[None]
    with accelerate(model):
        want = model(ids).logits
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(2))
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
    assert seen == [2, 1]


@torch.inference_mode()
def test_a_relay_runs_on_it():
    model, (ids, mask) = copied("qwen3"), prompts()
    with accelerate(model), Relay(model, 3, 64) as relay:
        queries = [
            relay.submit(row[kept.bool()].tolist(), max_new_tokens=NEW)
            for row, kept in zip(ids, mask, strict=True)
        ]
        relay.run()
    assert [query.tokens for query in queries] == expected("qwen3").tolist()


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_batch():
    """With its linear layers and its attention, a query's logits do not depend on its batch."""
    model, (ids, mask) = copied("llama"), prompts()
    model.set_attn_implementation("baton")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with accelerate(model):
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, seen in enumerate(mask.bool()):
            alone = model(ids[row][seen][None]).logits[0]
            assert_same_bits(batch[row][seen], alone, f"row {row}")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.inference_mode()
def test_a_compiled_step_is_one_graph(name, fresh_compiler):
    model, (ids, mask) = copied(name), prompts((9, 4))
    model.set_attn_implementation("baton")
    argument = cache_argument(model)

    def step(token, mask, positions, cache):
        out = model(token, attention_mask=mask, position_ids=positions, **{argument: cache})
        return out.logits[:, -1:].argmax(-1)

    def run(step):
        cache, seen = slot_cache(model, 32), torch.zeros(2, 32, dtype=torch.long)
        seen[:, :9] = mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(ids, attention_mask=mask, position_ids=positions, **{argument: cache})
        token, tokens = out.logits[:, -1:].argmax(-1), []
        for column in range(9, 14):
            seen[:, column] = 1
            token = step(token, seen.clone(), seen.sum(1, keepdim=True) - 1, cache)
            tokens.append(token)
        return torch.cat(tokens, 1)

    with accelerate(model):
        want = run(step)
        torch._dynamo.utils.counters.clear()
        assert torch.equal(run(torch.compile(step, fullgraph=True, backend="aot_eager")), want)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_are_refused():
    model = small_llama()
    with (
        accelerate(model),
        torch.enable_grad(),
        pytest.raises(NotImplementedError, match="no backward"),
    ):
        model(torch.arange(3, 12)[None])


def test_what_stays_as_it_is():
    """Adapters and modules that are not plain linear ones."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = small_llama()
    down = model.model.layers[0].mlp.down_proj
    doubled = Doubled(down.in_features, down.out_features, bias=False)
    doubled.load_state_dict(down.state_dict())
    model.model.layers[0].mlp.down_proj = doubled
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = model(ids).logits
        with accelerate(model):
            assert "forward" not in vars(doubled)
            torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


def test_refusals():
    with pytest.raises(TypeError, match="accelerate: model must be a transformers model, got Lin"):
        accelerate(nn.Linear(2, 2))
    model = small_llama()
    with accelerate(model), pytest.raises(ValueError, match="must not be accelerated already"):
        accelerate(model)
    with patch_llama(model), pytest.raises(NotImplementedError, match="must have an nn.Linear"):
        accelerate(model)
    with pytest.raises(NotImplementedError, match="accelerate: model must have an nn.Linear on"):
        accelerate(small_llama().double())
