"""patch_llama: the packed pass computes what the unpatched model computes, and leaves no trace."""

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from mixed_batch import mixed_batch
from torch import nn
from transformers import Cohere2Config, Cohere2ForCausalLM, LlamaForCausalLM

from baton_engines import load_model, patch_llama
from baton_engines.testing.small_llama import (
    QUERIES,
    ROPE_PARAMETERS,
    KnownQuery,
    as_float32,
    decoded_alone,
    decoded_together,
    relative_error,
    small_llama,
)
from baton_kernels.slot_memory import huge_page_bytes
from baton_kernels.testing import cpu_threads

CONFIGS = {
    "mha-16": {"num_key_value_heads": 4},
    "gqa-16-biases": {"attention_bias": True, "mlp_bias": True},
    "mqa-64-wide-heads": {"num_key_value_heads": 1, "head_dim": 64},
    "gqa-80-tied": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80}
    | {"tie_word_embeddings": True},
    "mha-128-one-layer": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
    | {"num_hidden_layers": 1},
    "gqa-64-swish": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
    | {"hidden_act": "swish"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread only slows down models this small, especially on a busy machine."""
    with cpu_threads(1):
        yield


@pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
@pytest.mark.parametrize("config", CONFIGS)
def test_float32_logits(config: str, aligned: bool) -> None:
    model = small_llama(**CONFIGS[config])
    expected = [decoded_alone(model, query) for query in QUERIES]
    with patch_llama(model) as llama:
        actual = decoded_together(llama, QUERIES, aligned=aligned)
    for logits, truth in zip(actual, expected, strict=True):
        assert logits.dtype == torch.float32
        assert relative_error(logits, truth) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("config", ["mha-16", "gqa-16-biases", "gqa-80-tied"])
def test_low_precision_logits(config: str, dtype: torch.dtype) -> None:
    model = small_llama(dtype=dtype, **CONFIGS[config])
    truth = torch.cat([decoded_alone(as_float32(model), query) for query in QUERIES])
    own_error = torch.cat([decoded_alone(model, query) for query in QUERIES]) - truth
    with patch_llama(model) as llama:
        error = torch.cat(decoded_together(llama, QUERIES)) - truth
    assert error.abs().max() <= 2 * own_error.abs().max()
    assert error.square().mean() <= 4 * own_error.square().mean()


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_rope_types_below_and_past_the_trained_length(rope_type: str) -> None:
    model = small_llama(rope_type=rope_type)
    expected = [decoded_alone(model, query) for query in QUERIES]
    assert any(len(query.token_ids) > model.config.max_position_embeddings for query in QUERIES)
    with patch_llama(model) as llama:
        actual = decoded_together(llama, QUERIES, aligned=rope_type == "dynamic")
    for logits, truth in zip(actual, expected, strict=True):
        assert relative_error(logits, truth) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, rope_type: str) -> None:
    with patch_llama(small_llama(dtype=dtype, rope_type=rope_type)) as llama:
        alone = [decoded_together(llama, [query], num_slots=1)[0] for query in QUERIES]
        with cpu_threads(2):
            ragged = decoded_together(llama, QUERIES)
        aligned = decoded_together(llama, QUERIES, aligned=True, num_slots=7)
    for bits, *others in zip(alone, ragged, aligned, strict=True):
        assert all(torch.equal(bits, other) for other in others)


def test_logits_of_all_of_the_last_or_of_no_tokens() -> None:
    with patch_llama(small_llama()) as llama:
        token_ids, batch, cache = mixed_batch(llama)
        every = llama.forward(token_ids, batch, cache, logits="all")
        last = llama.forward(token_ids, batch, cache)
        assert every.shape == (16, llama.vocab_size)
        assert torch.equal(last, every[[5, 6, 15]])
        keys = cache.keys[:, :3, :, :4].clone()
        cache.keys[:, [0, 2]] = torch.nan
        assert llama.forward(token_ids, batch, cache, logits="none") is None
        assert torch.equal(cache.keys[:, :3, :, :4], keys)


def test_calls_of_the_model_while_patched() -> None:
    model = small_llama()
    ids = QUERIES[0].token_ids[None]
    generation = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model(ids).logits
    generated = model.generate(ids, **generation)
    signature = inspect.signature(model.forward)
    with patch_llama(model, keep_parameters=True) as llama:
        token_ids, batch, cache = mixed_batch(llama)
        packed = model(token_ids[None], batch=batch, cache=cache, logits="all").logits
        assert torch.equal(packed, llama.forward(token_ids, batch, cache, logits="all"))
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert torch.equal(model.generate(ids, **generation), generated)
        assert torch.equal(copy.deepcopy(model)(ids).logits, plain)
        assert inspect.signature(model.forward) == signature
        with pytest.raises(ValueError, match="packed call must be"):
            model(token_ids, batch=batch)
        with pytest.raises(ValueError, match="packed call must be"):
            model(token_ids, batch=batch, cache=cache, attention_mask=token_ids)


def test_saving_while_patched(tmp_path) -> None:
    model = small_llama()
    with patch_llama(model):
        model.save_pretrained(tmp_path)
    saved = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(
        saved(QUERIES[0].token_ids[None]).logits, model(QUERIES[0].token_ids[None]).logits
    )


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_undo_restores_the_model(changes: dict[str, bool]) -> None:
    model = small_llama(**changes)
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    bits = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    attributes = set(model.__dict__)
    with pytest.raises(KeyError), patch_llama(model) as llama:
        assert set(model.__dict__) == attributes | {"forward"}
        raise KeyError
    assert set(model.__dict__) == attributes
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, bits[name])
        assert parameter.requires_grad == flags[name]
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    llama.undo()
    assert set(model.__dict__) == attributes
    model(QUERIES[0].token_ids[None]).logits.sum().backward()
    with patch_llama(model) as again:
        assert decoded_together(again, QUERIES[:1])[0].isfinite().all()
    assert isinstance(llama.model, LlamaForCausalLM)


def test_patching_in_inference_mode_leaves_trainable_parameters() -> None:
    model = small_llama()
    with torch.inference_mode(), patch_llama(model) as llama:
        decoded_together(llama, QUERIES[:1])
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_forward_that_hides_the_class_method_comes_back() -> None:
    model = small_llama()
    inner = model.forward

    def logged(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = logged
    patch_llama(model).undo()
    assert model.forward is logged
    llama = patch_llama(model)
    outer = model.forward
    model.forward = lambda *args, **kwargs: outer(*args, **kwargs)
    llama.undo()
    assert model(QUERIES[0].token_ids[None]).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="undone"):
        model(QUERIES[0].token_ids, batch=1, cache=1)


def test_handles_that_can_no_longer_compute() -> None:
    model = small_llama()
    llama = patch_llama(model)
    call = mixed_batch(llama)
    with pytest.raises(ValueError, match="must not be patched already"):
        patch_llama(model)
    model.double()
    with pytest.raises(RuntimeError, match="moved, converted or replaced"):
        llama.forward(*call)
    llama.undo()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    with pytest.raises(RuntimeError, match="undone"):
        llama.forward(*call)


def test_cache_in_huge_pages() -> None:
    with patch_llama(small_llama()) as llama:
        whole = 2 * llama.num_layers * 4 * huge_page_bytes()
        assert llama.new_cache(4, 32).bytes_reserved < whole
        assert llama.new_cache(4, 32, huge_pages=True).bytes_reserved == whole


def test_bad_arguments_of_the_packed_pass() -> None:
    with patch_llama(small_llama()) as llama, patch_llama(small_llama(head_dim=32)) as other:
        token_ids, batch, cache = mixed_batch(llama)
        with pytest.raises(ValueError, match=r"token_ids must be \[16\], got \[15\]"):
            llama.forward(token_ids[1:], batch, cache)
        with pytest.raises(ValueError, match="logits must be one of last, all, none, got 'first'"):
            llama.forward(token_ids, batch, cache, logits="first")
        with pytest.raises(ValueError, match=r"= \(2, 2, 16\), got \(2, 2, 32\)"):
            llama.forward(token_ids, batch, other.new_cache(4, 32))
        with pytest.raises(NotImplementedError, match=r"\(torch.float32\) .* got torch.float16"):
            llama.new_cache(4, 32, dtype=torch.float16)


def longrope() -> LlamaForCausalLM:
    model = small_llama()
    model.model.rotary_emb.rope_type = "longrope"
    return model


def replaced_module() -> LlamaForCausalLM:
    model = small_llama()
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    return model


def other_architecture() -> Cohere2ForCausalLM:
    return Cohere2ForCausalLM(
        Cohere2Config(vocab_size=8, hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    )


UNSUPPORTED = {
    "got transformers.models.cohere2.modeling_cohere2.Cohere2ForCausalLM": other_architecture,
    "pretraining_tp must be 1, got 2": lambda: small_llama(pretraining_tp=2),
    "hidden_act must be silu or swish, got gelu": lambda: small_llama(hidden_act="gelu"),
    "head_dim must be a multiple of 8 from 16 to 256, got 20": lambda: small_llama(head_dim=20),
    "num_key_value_heads must be a divisor": lambda: small_llama(num_key_value_heads=3),
    "default, linear, dynamic, llama3, yarn, got 'longrope'": longrope,
    "up_proj must be a plain Linear, got torch.nn.modules.container.Sequential": replaced_module,
    "float32, float16, bfloat16, got torch.float64": lambda: small_llama(dtype=torch.float64),
    "one device that holds data, got meta": lambda: small_llama().to("meta"),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_models_that_are_not_supported(message: str) -> None:
    model = UNSUPPORTED[message]()
    with pytest.raises(NotImplementedError) as caught:
        patch_llama(model)
    assert message in str(caught.value)
    assert "forward" not in model.__dict__


def test_something_else_than_a_model() -> None:
    with pytest.raises(TypeError, match="must be a LlamaForCausalLM, got str"):
        patch_llama("smollm2")


SMOLLM2_PROMPTS = ("What is the capital of France?", "Name three colors.", "Hi")


def smollm2_queries(tokenizer) -> list[KnownQuery]:
    """Prompts, and four more decoded tokens for each; the last one arrives late."""
    queries = []
    for number, text in enumerate(SMOLLM2_PROMPTS):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        queries.append(KnownQuery(torch.tensor(ids + ids[3:7]), len(ids), arrival=number // 2))
    return queries


def test_smollm2_float32() -> None:
    model, tokenizer = load_model("smollm2", torch.float32)
    queries = smollm2_queries(tokenizer)
    expected = [decoded_alone(model, query) for query in queries]
    with patch_llama(model) as llama:
        actual = decoded_together(llama, queries, num_slots=3)
    for logits, truth in zip(actual, expected, strict=True):
        assert relative_error(logits, truth) < 1e-4
        assert torch.equal(logits.argmax(-1), truth.argmax(-1))


@pytest.mark.slow
def test_smollm2_bfloat16() -> None:
    model, tokenizer = load_model("smollm2", torch.bfloat16)
    queries = smollm2_queries(tokenizer)[::2]
    wide = as_float32(model)
    truth = torch.cat([decoded_alone(wide, query) for query in queries])
    own_error = torch.cat([decoded_alone(model, query) for query in queries]) - truth
    with patch_llama(model) as llama:
        error = torch.cat(decoded_together(llama, queries, num_slots=3)) - truth
    assert error.abs().max() <= 2 * own_error.abs().max()
    assert error.square().mean() <= 4 * own_error.square().mean()
