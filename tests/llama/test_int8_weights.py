"""A patched model whose weights were rounded to int8.

| what | compared with |
| --- | --- |
| logits | near the exact ones; equal for owned and kept parameters, tied and not; batch-invariant |
| memory | half of bfloat16's; the process's peak while packing |
| the model's own values | exact if kept; else every read is refused, even after undo |
| arguments | other dtypes, devices, handles, processes: refused with the reason |
"""

import copy
import pickle

import pytest
import torch
from mixed_batch import mixed_batch
from patched_models import MODELS, assert_same_state, bits_of, logits_of

from baton_engines import Relay, patch_llama
from baton_engines.llama.packed_batch import PackedBatch
from baton_engines.llama.weights import checked_weight_dtype
from baton_engines.testing.small_llama import QUERIES, small_llama

IDS = QUERIES[0].token_ids[None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits(name, dtype):
    model = small_llama(**MODELS[name], dtype=dtype)
    bits = bits_of(model)
    with patch_llama(model, keep_parameters=True) as llama:
        exact = logits_of(llama)
    with patch_llama(model, weight_dtype="int8", keep_parameters=True) as llama:
        kept = logits_of(llama)
        assert_same_state(model.state_dict(), bits)
    assert_same_state(model.state_dict(), bits)
    error = (kept - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.05
    with patch_llama(model, weight_dtype=torch.int8) as llama:
        owned = logits_of(llama)
    # Kept parameters have an exact embedding, and the rows of a tied one are rounded otherwise.
    if name == "tied":
        error = (owned - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0 < error < 0.05
    else:
        assert torch.equal(owned, kept)


def test_logits_are_a_rows_own():
    model = small_llama(dtype=torch.bfloat16)
    with patch_llama(model, weight_dtype="int8") as llama:
        token_ids, batch, cache = mixed_batch(llama)
        together = llama.forward(token_ids, batch, cache)
        alone = llama.new_cache(1, 32)
        slot = alone.allocate(9)
        batch = PackedBatch.from_shape(alone.shape, [slot], [9])
        assert torch.equal(llama.forward(token_ids[7:], batch, alone)[0], together[2])


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_memory(name):
    """Sizes that fill their panels, except for the scales."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 4}
    model = small_llama(**sizes, **MODELS[name], dtype=torch.bfloat16)
    with patch_llama(model, keep_parameters=True) as llama:
        exact = llama.weight_bytes
    with patch_llama(model, weight_dtype="int8") as llama:
        assert llama.weight_dtype is torch.int8 and not llama.has_parameters
        assert 0.5 * exact < llama.weight_bytes < 0.53 * exact
        held = sum(
            p.untyped_storage().nbytes()
            for n, p in model.named_parameters()
            if n.endswith(("_proj.weight", "lm_head.weight"))
        )
        assert held < 2000


READERS = {
    "state_dict": lambda model: torch.save(model.state_dict(), "/dev/null"),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "a product": lambda model: model.lm_head(torch.zeros(1, model.lm_head.in_features)),
    "in place": lambda model: model.lm_head.weight.mul_(2),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("moment", ["while patched", "after undo"])
def test_own_values_are_gone(name, moment):
    model = small_llama()
    llama = patch_llama(model, weight_dtype="int8")
    if moment == "after undo":
        llama.undo()
        llama.undo()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"rounded to int8.*keep_parameters=True"),
    ):
        READERS[name](model)


def test_calls_of_a_model_whose_values_are_gone():
    model = small_llama()
    with patch_llama(model, weight_dtype="int8"), pytest.raises(RuntimeError, match="int8"):
        model(IDS)
    with pytest.raises(RuntimeError, match="rounded to int8"):
        model(IDS)
    for use in (patch_llama, Relay):
        with pytest.raises(RuntimeError, match="rounded to int8"):
            use(model)


def test_values_that_somebody_has_put_in_place():
    """A model that was converted while patched cannot be restored: the values are lost."""
    model = small_llama()
    llama = patch_llama(model, weight_dtype="int8")
    with pytest.raises(RuntimeError, match="rounded to int8"):
        model.double()
    llama.undo()


def test_bad_dtypes():
    model = small_llama()
    for value in ("int4", "bfloat16", torch.float16, 8):
        with pytest.raises(ValueError, match="patch_llama: weight_dtype must be None or 'int8', g"):
            patch_llama(model, weight_dtype=value)
    assert model(IDS).logits.isfinite().all()
    with pytest.raises(NotImplementedError, match="weight_dtype must be None for a model that is "):
        checked_weight_dtype("patch_llama", "int8", torch.device("cuda"))


def test_handles_in_other_processes():
    model = small_llama()
    with (
        patch_llama(model, weight_dtype="int8", keep_parameters=True) as llama,
        pickle.loads(pickle.dumps(llama)) as other,
    ):
        assert other.weight_dtype is torch.int8
        assert torch.equal(logits_of(other), logits_of(llama))
    with (
        patch_llama(model, weight_dtype="int8") as llama,
        pytest.raises(NotImplementedError, match="another process only with its own weights"),
    ):
        pickle.dumps(llama)


def answers(relay):
    queries = [relay.submit(query.token_ids, max_new_tokens=6, eos=None) for query in QUERIES]
    relay.run()
    return [query.tokens for query in queries]


def test_relay():
    model = small_llama()
    with (
        patch_llama(model, weight_dtype="int8", keep_parameters=True) as llama,
        Relay(llama, 2, 64) as relay,
    ):
        expected = answers(relay)
        with pytest.raises(ValueError, match="Relay: weight_dtype must be None with a handle"):
            Relay(llama, 2, 64, weight_dtype="int8")
    with Relay(model, 3, 64, weight_dtype="int8") as relay:
        assert answers(relay) == expected
        # A second relay shares the patch.
        with Relay(model, 1, 64, weight_dtype="int8") as other:
            assert answers(other) == expected
    with pytest.raises(RuntimeError, match="rounded to int8"):
        model(IDS)


def test_relay_on_a_model_that_is_patched_otherwise():
    model = small_llama()
    with (
        Relay(model, 1, 64),
        pytest.raises(ValueError, match="weight_dtype must be None for a model that is patched"),
    ):
        Relay(model, 1, 64, weight_dtype="int8")
    assert model(IDS).logits.isfinite().all()


def test_relay_on_a_model_that_only_runs_its_own_code():
    model = small_llama()
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="hook"):
        Relay(model, 1, 64, weight_dtype="int8")
    hook.remove()
