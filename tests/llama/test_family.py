"""Decoders that differ from Llama in details, in the packed pass: each compared with its own
model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from baton_engines import Relay, patch_llama
from baton_engines.huggingface import AnyModel, adapt
from baton_engines.llama.family import SUPPORTED_MODELS, find_family
from baton_engines.testing.small_llama import (
    QUERIES,
    as_float32,
    decoded_alone,
    decoded_together,
    relative_error,
    small_decoder,
    small_llama,
)
from baton_kernels.testing import cpu_threads

# Shorter than the queries, so that it hides something.
WINDOW = 3
LAYER_TYPES = ["sliding_attention", "full_attention"]
DECODERS = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW}),
    # Biases of q, k and v, but not of the output.
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYER_TYPES},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW}
        | {"layer_types": LAYER_TYPES},
    ),
    # Every second layer without rotary embedding.
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": WINDOW}
        | {"layer_types": LAYER_TYPES},
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5}
        | {"attention_multiplier": 0.3},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with cpu_threads(1):
        yield


def make(name: str, **changes: object):
    prefix, settings = DECODERS[name]
    return small_decoder(prefix, **settings, **changes)


@pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
@pytest.mark.parametrize("name", DECODERS)
def test_float32_logits(name: str, aligned: bool) -> None:
    model = make(name)
    expected = [decoded_alone(model, query) for query in QUERIES]
    with patch_llama(model) as handle:
        actual = decoded_together(handle, QUERIES, aligned=aligned)
    for logits, truth in zip(actual, expected, strict=True):
        assert relative_error(logits, truth) < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_logits(name: str) -> None:
    model = make(name, dtype=torch.bfloat16)
    truth = torch.cat([decoded_alone(as_float32(model), query) for query in QUERIES])
    own_error = torch.cat([decoded_alone(model, query) for query in QUERIES]) - truth
    with patch_llama(model) as handle:
        error = torch.cat(decoded_together(handle, QUERIES)) - truth
    assert error.abs().max() <= 2 * own_error.abs().max()
    assert error.square().mean() <= 4 * own_error.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", DECODERS)
def test_bits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    with patch_llama(make(name, dtype=dtype)) as handle:
        alone = [decoded_together(handle, [query], num_slots=1)[0] for query in QUERIES]
        ragged = decoded_together(handle, QUERIES)
    assert all(torch.equal(a, b) for a, b in zip(alone, ragged, strict=True))


# Without a window Mistral is Llama.
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "mistral"])
def test_the_details_matter(name: str) -> None:
    """The details of each decoder change its logits here, so the tests above notice them."""
    prefix, settings = DECODERS[name]
    model = make(name)
    llama = small_llama(head_dim=settings.get("head_dim", 16))
    llama.load_state_dict(model.state_dict(), strict=False)
    query = QUERIES[0]
    assert relative_error(decoded_alone(llama, query), decoded_alone(model, query)) > 1e-2


@pytest.mark.parametrize("name", DECODERS)
def test_undo_gives_the_bits_back(name: str) -> None:
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with patch_llama(model) as handle:
        decoded_together(handle, QUERIES[:1])
    assert "forward" not in vars(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["qwen3-window", "granite"])
def test_relay_chooses_the_patch(name: str) -> None:
    model = make(name)
    prompts = [query.token_ids[:5].tolist() for query in QUERIES]
    with adapt(model) as handle:
        assert type(handle).__name__ == "PatchedLlama"
        with Relay(handle, 2, 16) as relay:
            patched = [relay.submit(prompt, max_new_tokens=6, eos=None) for prompt in prompts]
            relay.run()
    with AnyModel(model) as handle, Relay(handle, 2, 16) as relay:
        own = [relay.submit(prompt, max_new_tokens=6, eos=None) for prompt in prompts]
        relay.run()
    assert [query.tokens for query in patched] == [query.tokens for query in own]


def test_each_supported_model_is_tested() -> None:
    tested = {f"{prefix}ForCausalLM" for prefix, _ in DECODERS.values()} | {"LlamaForCausalLM"}
    assert tested == set(SUPPORTED_MODELS)


def test_a_norm_of_another_kind_is_refused() -> None:
    model = make("qwen3")
    model.model.layers[1].self_attn.k_norm = nn.LayerNorm(16)
    with pytest.raises(NotImplementedError, match=r"k_norm must be a plain Qwen3RMSNorm, got"):
        patch_llama(model)


def test_other_decoders_have_no_family() -> None:
    assert find_family(small_decoder("Gemma")) is None
    assert find_family(nn.Linear(2, 2)) is None


def test_generate_under_the_name_of_a_later_transformers() -> None:
    """From 5.24 on a model's own cache is called `cache`, like the packed call's."""
    model = make("qwen2")
    received = {}
    model.forward = lambda *args, **kwargs: received.update(kwargs)
    with patch_llama(model, keep_parameters=True):
        model(torch.tensor([[1]]), cache="theirs")
    assert received == {"cache": "theirs"}
