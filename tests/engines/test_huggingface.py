"""`attn_implementation="baton"` in unmodified transformers models, compared token by token with
eager attention in float32."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
import torch
from hf_models import MODELS, NEW, expected, generate, make, prompts
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from baton_engines.huggingface import attention, cache_argument, row_mask, slot_cache, versions


@pytest.fixture(autouse=True)
def _no_fallback_counted():
    attention.fallbacks.clear()


# ---- attn_implementation="baton" under generate


@pytest.mark.parametrize("kind", ["dynamic", "static", "slot"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_tokens_of_eager(name, kind):
    model, (ids, mask) = make(name), prompts()
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "slot": {"cache": slot_cache(model, ids.shape[1] + NEW)},
    }[kind]
    assert torch.equal(generate(model, "baton", ids, mask, NEW, **options), expected(name))
    assert not attention.fallbacks


@pytest.mark.parametrize("kind", ["dynamic", "slot"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss_sinks", "qwen2_moe_window"])
def test_beams(name, kind):
    model, (ids, mask) = make(name), prompts()
    options = {"cache": slot_cache(model, ids.shape[1] + NEW)} if kind == "slot" else {}
    got = generate(model, "baton", ids, mask, NEW, num_beams=3, **options)
    assert torch.equal(got, expected(name, 3))
    assert not attention.fallbacks


def test_chunked_attention_falls_back_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(attention, "_warned", set())
    ids, mask = prompts()
    with caplog.at_level(logging.WARNING):
        got = generate(make("llama4"), "baton", ids, mask, NEW)
    assert torch.equal(got, generate(make("llama4"), "eager", ids, mask, NEW))
    # Three of four layers are chunked.
    assert attention.fallbacks == {"the mask is dense": 3 * NEW}
    assert [r for r in caplog.messages if row_mask.CHUNKED in r] == [
        f'attn_implementation="baton" computes by sdpa where {row_mask.CHUNKED}'
    ]


def _logits(model, name, ids, mask, **options):
    model.set_attn_implementation(name)
    return model(ids, attention_mask=mask, **options).logits


def right_padded():
    ids, mask = prompts()
    return ids.flip(1), mask.flip(1)


def with_holes():
    ids, mask = prompts()
    mask[:, -5] = 0
    return ids, mask


@pytest.mark.parametrize("make_mask", [right_padded, with_holes])
@torch.inference_mode()
def test_padding_elsewhere_falls_back(make_mask):
    model, (ids, mask) = make("qwen3"), make_mask()
    got = _logits(model, "baton", ids, mask)
    assert attention.fallbacks == {"the mask is dense": 4}
    torch.testing.assert_close(
        got[mask.bool()], _logits(model, "sdpa", ids, mask)[mask.bool()], rtol=0, atol=1e-4
    )


@torch.inference_mode()
def test_packed_sequences_fall_back():
    model = make("llama")
    ids, positions = torch.arange(5, 15)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    got = _logits(model, "baton", ids, None, position_ids=positions, use_cache=False)
    assert attention.fallbacks == {"the mask is dense": 4}
    want = _logits(model, "eager", ids, None, position_ids=positions, use_cache=False)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_mask_of_the_user_is_respected():
    model, ids = make("llama"), torch.arange(5, 15)[None]
    dense = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    dense[..., 3] = False
    got, want = (_logits(model, name, ids, dense) for name in ("baton", "sdpa"))
    # Token 3 sees all but itself, in both.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_gradients_are_those_of_sdpa():
    model, (ids, mask) = make("gemma3"), prompts()

    def gradient(name):
        model.zero_grad()
        _logits(model, name, ids, mask)[mask.bool()].square().mean().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    try:
        got = gradient("baton")
        assert attention.fallbacks == {"gradients are needed": 4}
        torch.testing.assert_close(got, gradient("sdpa"))
    finally:
        model.zero_grad()


@torch.inference_mode()
def test_softcap_and_sinks_are_never_dropped():
    ids, mask = right_padded()
    for name in ("gemma2_softcap", "gpt_oss_sinks"):
        with pytest.raises(NotImplementedError, match=r"must come with a causal mask.*eager"):
            _logits(make(name), "baton", ids, mask)


@torch.inference_mode()
def test_padding_may_hold_nan():
    model, (ids, mask) = make("mistral_window"), prompts()
    outs = []
    for poison in (False, True):
        cache = slot_cache(model, 64)
        key = {cache_argument(model): cache}
        _logits(model, "baton", ids, mask, **key)
        if poison:
            for layer in cache.layers:
                for tensor in (layer.keys, layer.values):
                    tensor[:, :, ids.shape[1] :] = float("nan")
                    for row, padding in enumerate((mask == 0).sum(1).tolist()):
                        tensor[row, :, :padding] = float("nan")
        more = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = more.sum(1, keepdim=True) - 1
        outs.append(_logits(model, "baton", ids[:, -1:], more, position_ids=positions, **key))
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()


# ---- the mask


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("past", "tokens", "kv_offset"), [(0, 9, 0), (9, 1, 0), (12, 3, 4)])
def test_rows_say_what_the_dense_mask_says(window, past, tokens, kv_offset):
    end = past + tokens
    mask = torch.arange(end) >= torch.tensor([0, 2, 8, end])[:, None]
    encoded = row_mask.encode(4, end, kv_offset, window, mask, "cpu", checked=True)
    assert encoded.shape == (4, 2, 1 if window is None else 1 + window, 1)
    # Its window takes no memory.
    assert encoded.untyped_storage().nbytes() == 4 * 2 * 4
    columns = torch.arange(kv_offset, end)
    query = torch.arange(past, end)[:, None]
    want = (columns <= query) & mask[:, None, None, kv_offset:]
    if window is not None:
        want &= columns > query - window
    got = row_mask.to_dense(row_mask.decode(encoded), tokens, end - kv_offset)
    assert torch.equal(got, want)


def test_a_row_that_could_not_be_checked_is_marked():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    encode = functools.partial(row_mask.encode, 4, 4, 0, None, mask, "cpu")
    assert encode(checked=True) is None
    assert row_mask.decode(encode(checked=False)).unexpressed.tolist() == [False, True, True, False]


def test_an_unchecked_row_gives_nan_and_the_others_their_results():
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 6, 16)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]).bool()
    encoded = row_mask.encode(2, 6, 0, None, mask, "cpu", checked=False)
    out, _ = attention.attention(torch.nn.Module(), query, key, key, encoded)
    checked = row_mask.encode(1, 6, 0, None, mask[:1], "cpu", checked=True)
    alone, _ = attention.attention(torch.nn.Module(), query[:1], key[:1], key[:1], checked)
    assert torch.equal(out[:1], alone)
    assert out[1].isnan().all()


def test_masks_of_sdpa_are_made_as_sdpa_makes_them():
    mask = torch.tensor([[1, 1, 0, 1]]).bool()
    common = {"batch_size": 1, "q_length": 4, "kv_length": 4, "attention_mask": mask}
    assert torch.equal(attention.mask(**common), sdpa_mask(**common, allow_is_causal_skip=False))


@torch.inference_mode()
def test_a_decode_step_waits_for_no_device(monkeypatch):
    """Stands in for a device: tensors whose values must not be read."""
    monkeypatch.setattr(attention, "_is_on_host", lambda tensor: False)

    class NoReading(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            assert name not in ("item", "__bool__", "__int__", "__index__", "tolist"), name
            return function(*args, **(kwargs or {}))

    model, (_, mask) = make("gemma3"), prompts()
    query, key = torch.randn(6, 4, 1, 16), torch.randn(6, 2, 64, 16)
    with NoReading():
        # A static cache keeps its length on the device.
        encoded = attention.mask(
            6, 1, 64, torch.tensor(39), attention_mask=mask.bool(), config=model.config
        )
        out, _ = attention.attention(torch.nn.Module(), query, key, key, encoded)
    assert out.isfinite().all()


# ---- torch.compile


@pytest.mark.parametrize("kind", ["static", "slot"])
def test_a_compiled_decode_step_is_one_graph(kind, fresh_compiler):
    model, (ids, mask) = make("llama"), prompts()
    model.set_attn_implementation("baton")
    name, capacity = cache_argument(model), 64

    def step(token, mask, positions, cache):
        out = model(token, attention_mask=mask, position_ids=positions, **{name: cache})
        return out.logits[:, -1:].argmax(-1)

    def run(step, rows):
        cache = (
            slot_cache(model, capacity)
            if kind == "slot"
            else StaticCache(config=model.config, max_cache_len=capacity)
        )
        with torch.inference_mode():
            prompt, seen = ids[rows], torch.zeros(len(rows), capacity, dtype=torch.long)
            seen[:, : prompt.shape[1]] = mask[rows]
            positions = (mask[rows].cumsum(1) - 1).clamp(min=0)
            token = (
                model(prompt, attention_mask=mask[rows], position_ids=positions, **{name: cache})
                .logits[:, -1:]
                .argmax(-1)
            )
            positions, tokens = positions[:, -1:], []
            for column in range(prompt.shape[1], prompt.shape[1] + 6):
                seen[:, column] = 1
                positions = positions + 1
                token = step(token, seen.clone(), positions, cache)
                tokens.append(token)
        return torch.cat(tokens, 1)

    # Rows of other lengths in the second batch.
    batches = [[0, 1, 2], [5, 4, 3]]
    want = [run(step, rows) for rows in batches]
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(run(compiled, rows), tokens) for rows, tokens in zip(batches, want, strict=True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Step(torch.nn.Module):
    """A decode step whose cache consists of its buffers, as torch.export requires."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache
        for index, layer in enumerate(cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                self.register_buffer(f"{name}{index}", getattr(layer, name))

    def forward(self, token, mask, positions):
        for index, layer in enumerate(self.cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                setattr(layer, name, getattr(self, f"{name}{index}"))
        cache = {cache_argument(self.model): self.cache}
        return self.model(token, attention_mask=mask, position_ids=positions, **cache).logits


@torch.no_grad()
def test_an_exported_decode_step_runs_with_other_lengths(tmp_path):
    model, (ids, mask) = make("gemma3"), prompts()
    model.set_attn_implementation("baton")

    def prefilled(rows):
        cache, seen = slot_cache(model, 64), torch.zeros(len(rows), 64, dtype=torch.long)
        seen[:, : mask.shape[1]] = mask[rows]
        positions = (mask[rows].cumsum(1) - 1).clamp(min=0)
        token = (
            model(
                ids[rows],
                attention_mask=mask[rows],
                position_ids=positions,
                **{cache_argument(model): cache},
            )
            .logits[:, -1:]
            .argmax(-1)
        )
        return Step(model, cache), seen, token, positions[:, -1:]

    step, seen, token, positions = prefilled([0, 1])
    first = seen.clone()
    first[:, mask.shape[1]] = 1
    torch.export.save(
        torch.export.export(step, (token, first, positions + 1), strict=False),
        tmp_path / "step.pt2",
    )
    exported = torch.export.load(tmp_path / "step.pt2").module()
    # Other queries than those it was exported with, with other lengths.
    step, seen, token, positions = prefilled([4, 5])
    exported.load_state_dict(step.state_dict(), strict=False)
    for column in range(mask.shape[1], mask.shape[1] + 5):
        seen[:, column], positions = 1, positions + 1
        want = step(token, seen, positions)
        assert torch.equal(exported(token, seen, positions), want)
        token = want[:, -1:].argmax(-1)


def test_sdpa_is_what_it_was():
    """Registering adds a name and changes no others."""
    from transformers import AttentionInterface

    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("version", ["5.16.4", "4.57.0", "6.0.0.dev0"])
def test_other_releases_of_transformers_are_refused(version):
    with pytest.raises(ImportError, match=rf"must be >= 5.17 and < 6.0, got {version}: `pip"):
        versions.check_version(version)


def test_the_bounds_are_those_of_the_extra():
    oldest, following = versions.OLDEST, versions.NEXT
    bounds = f'"transformers>={oldest[0]}.{oldest[1]},<{following[0]}"'
    assert bounds in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for version in ("5.17.0", "5.23.0", "5.99.1"):
        versions.check_version(version)
