"""The weights of a patched model on the CPU: packed, and parameters that give up their memory.

| what | compared with |
| --- | --- |
| memory | bytes of storages while patched; the process's peak while packing and undoing |
| undo | the same parameters with the same bits |
| readers | state_dict, save_pretrained, deepcopy, pickle: exact, and plain parameters |
| writers and unpatched calls | refused with the reason |
| logits | equal for owned and kept parameters, tied and not |
"""

import copy
import functools
import json
import pickle
from pathlib import Path

import pytest
import torch
import warm
from mixed_batch import mixed_batch
from patched_models import MODELS, assert_same_state, bits_of, logits_of
from torch import nn
from transformers import LlamaForCausalLM

from baton_engines import patch_llama
from baton_engines.llama.packed_parameter import PackedParameter
from baton_engines.testing.small_llama import QUERIES, small_llama

IDS = QUERIES[0].token_ids[None]


def storage_bytes(model: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_hold_no_memory_while_patched(name):
    model = small_llama(**MODELS[name])
    stand_ins = [
        p for n, p in model.named_parameters() if n.endswith(("_proj.weight", "lm_head.weight"))
    ]
    if name == "tied":
        stand_ins.append(model.lm_head.weight)
    whole, freed = storage_bytes(model), sum(p.nbytes for p in stand_ins)
    sizes = {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    with patch_llama(model) as llama:
        assert not llama.has_parameters
        assert storage_bytes(model) == whole - freed + 4 * len(stand_ins)
        # The originals, which undo restores, hold no memory either.
        assert sum(p.untyped_storage().nbytes() for p in stand_ins) == 0
        assert sizes == {
            n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
        }
    assert storage_bytes(model) == whole


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_and_bits(name, dtype):
    model = small_llama(**MODELS[name], dtype=dtype)
    bits = bits_of(model)
    with patch_llama(model, keep_parameters=True) as llama:
        assert llama.has_parameters
        expected = logits_of(llama)
        assert_same_state(model.state_dict(), bits)
    assert_same_state(model.state_dict(), bits)
    with patch_llama(model) as llama:
        assert torch.equal(logits_of(llama), expected)
        assert_same_state(model.state_dict(), bits)
    assert_same_state(model.state_dict(), bits)
    assert not any(isinstance(p, PackedParameter) for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_plain_and_exact(name):
    model = small_llama(**MODELS[name])
    plain, bits = model(IDS).logits, bits_of(model)
    with patch_llama(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for made in copies:
        assert all(type(p) is nn.Parameter for p in made.parameters())
        assert_same_state(made.state_dict(), bits)
        assert torch.equal(made(IDS).logits, plain)
        assert (made.lm_head.weight is made.model.embed_tokens.weight) == (name == "tied")


@pytest.mark.parametrize("name", MODELS)
def test_saving(name, tmp_path):
    model = small_llama(**MODELS[name])
    bits = bits_of(model)
    with patch_llama(model):
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "state.pt")
    assert_same_state(
        LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict(), bits
    )
    assert_same_state(torch.load(tmp_path / "state.pt"), bits)


def test_parts_of_the_model_compute_with_the_exact_values():
    """Reading unpacks: a module that is called by itself is slow, but never wrong."""
    model = small_llama()
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.in_features)
    with torch.no_grad():
        expected = linear(x)
        stacked = torch.stack([linear.weight, linear.weight]).sum()
        with patch_llama(model):
            assert torch.equal(linear(x), expected)
            assert torch.equal(x @ linear.weight.T, x @ linear.weight.detach().T)
            assert torch.equal(torch.stack([linear.weight, linear.weight]).sum(), stacked)
            assert "PackedParameter(shape=" in repr(linear.weight)


def test_unpatched_calls_are_refused():
    model = small_llama()
    with patch_llama(model):
        for call in (model, functools.partial(model.generate, max_new_tokens=2, pad_token_id=0)):
            with pytest.raises(RuntimeError, match=r"weights are packed.*keep_parameters=True"):
                call(IDS)
    assert model(IDS).logits.isfinite().all()


WRITES = {
    "in place": lambda w: w.mul_(2),
    "item": lambda w: w.__setitem__(0, 1.0),
    "data": lambda w: w.data.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_is_refused(name):
    model = small_llama()
    bits = bits_of(model)
    with torch.no_grad(), patch_llama(model):
        with pytest.raises(RuntimeError, match="cannot be written while it is packed"):
            WRITES[name](model.model.layers[1].self_attn.v_proj.weight)
        assert_same_state(model.state_dict(), bits)
    assert_same_state(model.state_dict(), bits)


def test_loading_is_refused():
    model = small_llama()
    state = bits_of(model)
    with patch_llama(model), pytest.raises(RuntimeError, match="while it is packed"):
        model.load_state_dict(state)


def test_converted_while_patched():
    """The values are converted, and belong to the parameters after undo."""
    model = small_llama()
    expected = {name: value.double() for name, value in bits_of(model).items()}
    llama = patch_llama(model)
    model.double()
    with pytest.raises(RuntimeError, match="moved, converted or replaced"):
        logits_of(llama)
    assert_same_state(model.state_dict(), expected)
    llama.undo()
    assert_same_state(model.state_dict(), expected)


def test_kept_parameters_are_the_models_own():
    model = small_llama()
    pointers = [p.data_ptr() for p in model.parameters()]
    with patch_llama(model, keep_parameters=True):
        assert [p.data_ptr() for p in model.parameters()] == pointers
        assert torch.isfinite(model(IDS).logits).all()
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_a_token_beyond_the_vocabulary():
    for changes in MODELS.values():
        with patch_llama(small_llama(**changes)) as llama:
            token_ids, batch, cache = mixed_batch(llama)
            token_ids[3] = llama.vocab_size
            with pytest.raises((IndexError, ValueError)):
                llama.forward(token_ids, batch, cache)


# Peak memory

PEAK = """
import ctypes, json, sys
from pathlib import Path
import torch
from baton_engines.llama import patch_llama
from baton_engines.llama.packed_projection import return_free_memory
from baton_engines.testing.small_llama import small_llama

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

# No transparent huge pages: the kernel hands them out as it likes, 2 MiB at a time.
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
keep = sys.argv[1] == "keep"
torch.set_num_threads(1)
with patch_llama(small_llama()):
    pass
model = small_llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, vocab_size=200)
layer = sum(p.nbytes for p in model.model.layers[0].parameters())
return_free_memory()
found = {"layer": layer, "weights": sum(p.nbytes for p in model.parameters())}
def peak_of(call):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    return result, status("VmHWM") - before, status("VmRSS") - before
llama, *found["patch"] = peak_of(lambda: patch_llama(model, keep_parameters=keep))
_, *found["undo"] = peak_of(llama.undo)
print(json.dumps(found))
"""


def measured(mode: str) -> dict:
    done = warm.run("-c", PEAK, mode)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="needs /proc/self/clear_refs, which some containers lack",
)
def test_peak_while_packing_and_undoing():
    """At most one layer more than the weights; kept parameters take the weights' size once more."""
    slack = 5 << 20  # what the allocator keeps
    found = measured("own")
    for peak, after in (found["patch"], found["undo"]):
        assert peak <= found["layer"] + slack, found
        assert abs(after) <= slack, found
    found = measured("keep")
    assert found["weights"] * 0.9 <= found["patch"][1], found
