"""Who owns a patch, what it does not allow, and relays that are dropped instead of closed."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from baton_engines import Relay, patch_llama, unpatch
from baton_engines.llama.forward import PatchedForward
from baton_engines.testing.small_llama import QUERIES, small_llama

PROMPT = [5, 6, 7]


def answer(relay: Relay, **options) -> list[int]:
    query = relay.submit(PROMPT, max_new_tokens=6, eos=None, **options)
    relay.run()
    return query.result()


def is_patched(model) -> bool:
    return "forward" in model.__dict__


def test_a_dropped_relay_leaves_no_patch():
    model = small_llama()
    before = [parameter.clone() for parameter in model.parameters()]
    relay = Relay(model, 2)
    expected = answer(relay)
    relay = None
    gc.collect()
    assert not is_patched(model)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    with Relay(model, 2) as relay:
        assert answer(relay) == expected
    assert not is_patched(model)


def test_a_cell_that_runs_twice():
    model = small_llama()
    relays = []
    for _ in range(3):
        # The name still holds the first one while the second one is made.
        relay = Relay(model, 2)
        relays.append(answer(relay))
    assert relays[0] == relays[1] == relays[2]
    del relay
    gc.collect()
    assert not is_patched(model)


def test_relays_share_a_patch_until_the_last_is_closed():
    model = small_llama()
    first, second = Relay(model, 2), Relay(model, 3)
    expected = answer(first)
    first.close()
    assert is_patched(model) and answer(second) == expected
    first.close()
    assert is_patched(model)
    second.close()
    assert not is_patched(model)


def test_a_patch_of_the_user_stays():
    model = small_llama()
    with patch_llama(model) as llama:
        with Relay(model, 2) as relay, Relay(llama, 2) as other:
            assert answer(relay) == answer(other)
        assert is_patched(model)
    assert not is_patched(model)


def test_unpatch():
    model = small_llama()
    unpatch(model)
    logits = model(QUERIES[0].token_ids[None]).logits
    relay = Relay(model, 2)
    patch = model.forward
    unpatch(model)
    assert not is_patched(model) and patch.handle is None
    assert torch.equal(model(QUERIES[0].token_ids[None]).logits, logits)
    query = relay.submit(PROMPT, max_new_tokens=2)
    relay.run()
    assert "the patch was undone; call patch_llama again" in str(query.error)
    relay.close()
    patch_llama(model)
    with pytest.raises(ValueError, match=r"call baton_engines.unpatch\(model\) first"):
        patch_llama(model)
    unpatch(model)
    assert not is_patched(model)


# Parts of a model that the packed pass would ignore


def hooked(register: str, module: str):
    model = small_llama()
    function = getattr(model.get_submodule(module), register)
    function(lambda *_: None)
    return model


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("module", ["", "model", "model.layers.1.mlp.down_proj", "lm_head"])
def test_hooks_are_refused(register, module):
    match = f"free of forward hooks.* got a hook on {module or 'model'}; remove it"
    model = hooked(register, module)
    with pytest.raises(NotImplementedError, match=match):
        patch_llama(model)
    assert not is_patched(model)


def test_a_relay_calls_the_hooks_that_a_patch_would_not():
    model, calls = small_llama(), []
    plain = Relay(model, 2)
    expected = answer(plain)
    plain.close()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with Relay(model, 2) as relay, Relay(model, 3) as other:
        assert answer(relay) == answer(other) == expected
        assert len(calls) >= 12
        assert not is_patched(model)
        implementation = model.config._attn_implementation
    assert model.config._attn_implementation != implementation


def test_a_hook_that_comes_later_is_refused_then():
    model = small_llama()
    with Relay(model, 2) as relay:
        expected = answer(relay)
        hook = model.model.layers[0].register_forward_hook(lambda *_: None)
        query = relay.submit(PROMPT, max_new_tokens=2)
        relay.run()
        assert "got a hook on model.layers.0" in str(query.error)
        hook.remove()
        assert answer(relay) == expected


def test_recorders_of_transformers_do_not_count():
    model = small_llama()
    states = model(QUERIES[0].token_ids[None], output_hidden_states=True).hidden_states
    assert len(states) > 1
    assert any(module._forward_hooks for module in model.modules())
    with Relay(model, 2) as relay:
        answer(relay)


class Louder(LlamaForCausalLM):
    """A model with its own forward."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


class Renamed(LlamaForCausalLM):
    """A subclass that computes what its base does."""


def as_class(kind: type) -> LlamaForCausalLM:
    model = small_llama()
    model.__class__ = kind
    return model


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    with pytest.raises(NotImplementedError, match=r"forward must be that of Llama.*\.Louder over"):
        patch_llama(as_class(Louder))
    patch_llama(as_class(Renamed)).undo()


def quantised():
    model = small_llama()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def adapted():
    """Like PEFT, which is not installed here: a Linear of another package."""
    model = small_llama()
    kind = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    for layer in model.model.layers:
        layer.self_attn.q_proj = kind()
    return model


def wrapped():
    model = adapted()
    model.__class__ = type("PeftModelForCausalLM", (nn.Module,), {"__module__": "peft.peft_model"})
    return model


def offloaded():
    model = small_llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = mlp.forward
    return model


def subclassed_weight():
    model = small_llama()
    kind = type("Int4Tensor", (nn.Parameter,), {"__module__": "torchao.quantization"})
    weight = model.lm_head.weight
    model.lm_head.weight = torch.Tensor._make_subclass(kind, weight.data, True)
    return model


def parametrized():
    model = small_llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            quantised,
            "lm_head must be a plain Linear, got torch.ao.nn.quantized.dynamic.modules.linear."
            "Linear; load the model with unquantised weights",
        ),
        (
            adapted,
            "model.layers.0.self_attn.q_proj must be a plain Linear, got "
            "peft.tuners.lora.layer.Linear; merge the adapter first: "
            "model = model.merge_and_unload()",
        ),
        (wrapped, "got peft.peft_model.PeftModelForCausalLM; merge the adapter first: model = "),
        (offloaded, "got another forward on model.layers.1.mlp"),
        (subclassed_weight, "lm_head.weight must be a plain Parameter, got torchao.quantization.I"),
        (parametrized, "model.layers.0.mlp.up_proj must be a plain Linear, got torch.nn.utils.pa"),
    ],
)
def test_models_that_compute_something_else_say_what_to_do(make, message):
    model = make()
    with pytest.raises(NotImplementedError) as caught:
        patch_llama(model)
    assert message in str(caught.value)


def test_copies_of_a_model_under_a_relay():
    model = small_llama()
    with Relay(model, 2) as relay:
        expected = answer(relay)
        copied = copy.deepcopy(model)
        revived = pickle.loads(pickle.dumps(model))
    for other in (copied, revived):
        assert not isinstance(other.forward, PatchedForward)
        with patch_llama(other) as llama:
            assert llama.model is other
        with Relay(other, 2) as relay:
            assert answer(relay) == expected


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_changes_nothing(device):
    model = small_llama()
    options = {
        "temperature": 1.1,
        "top_k": 20,
        "repetition_penalty": 1.2,
        "logit_bias": {3: 0.5},
        "suppress_tokens": [4],
        "logprobs": 2,
        "seed": 3,
    }
    with Relay(model, 2) as relay:
        expected = answer(relay, **options)
    torch.set_default_device(device)
    try:
        with Relay(model, 2) as relay:
            assert answer(relay, **options) == expected
            query = relay.submit(PROMPT, max_new_tokens=4, top_p=0.9, temperature=1.0)
            relay.step()
            relay.preempt(query)
            relay.resize(3)
            relay.resume(query)
            relay.run()
            assert query.status == "finished", query.error
        aligned = Relay(model, 2, aligned=True, prefill="overlapped")
        assert answer(aligned, **options) == expected
        aligned.close()
    finally:
        torch.set_default_device(None)
