"""`attn_implementation="baton"`, `SlotCache` and `AnyModel` in unmodified transformers models:
token for token what transformers' eager attention gives, in float32."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from baton_engines import Relay
from baton_engines.huggingface import AnyModel, attention, row_mask, slot_cache

sys.path.append(str(Path(__file__).parent))
import hf_models
from hf_models import MODELS, generate, make, prompts

NEW = 24


@pytest.fixture(autouse=True)
def _no_fallback_counted():
    attention.fallbacks.clear()


@functools.cache
def expected(name: str, beams: int = 1) -> torch.Tensor:
    """What eager attention generates."""
    options = {"num_beams": beams} if beams > 1 else {}
    return generate(make(name), "eager", *prompts(), NEW, **options)


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
        key = {hf_models.cache_argument(model): cache}
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
    """What stands for a device here: reading a value of a tensor raises after prefill."""
    model, (ids, mask) = make("gemma3"), prompts()
    model.set_attn_implementation("baton")

    class NoItem(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            assert name not in ("item", "__bool__", "__int__", "tolist"), name
            return function(*args, **(kwargs or {}))

    on_device = mask[:, :].bool()
    monkeypatch.setattr(attention, "_is_on_host", lambda tensor: False)
    cache = StaticCache(config=model.config, max_cache_len=64)
    for layer in cache.layers:
        layer.lazy_initialization(*(torch.zeros(6, 2, 0, 16) for _ in range(2)))
    with NoItem():
        encoded = attention.mask(
            6, 1, 40, torch.tensor(39), attention_mask=on_device, config=model.config
        )
        query, key = torch.randn(6, 4, 1, 16), torch.randn(6, 2, 64, 16)
        out, _ = attention.attention(torch.nn.Module(), query, key, key, encoded)
    assert out.isfinite().all()


# ---- torch.compile


@pytest.mark.parametrize("kind", ["static", "slot"])
def test_a_compiled_decode_step_is_one_graph(kind, fresh_compiler):
    model, (ids, mask) = make("llama"), prompts()
    model.set_attn_implementation("baton")
    name, capacity = hf_models.cache_argument(model), 64

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
            token = model(
                prompt, attention_mask=mask[rows], position_ids=positions, **{name: cache}
            ).logits[:, -1:].argmax(-1)
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
    """A decode step whose cache are its buffers, as torch.export wants it."""

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
        cache = {hf_models.cache_argument(self.model): self.cache}
        return self.model(token, attention_mask=mask, position_ids=positions, **cache).logits


@torch.no_grad()
def test_an_exported_decode_step_runs_with_other_lengths(tmp_path):
    model, (ids, mask) = make("gemma3"), prompts()
    model.set_attn_implementation("baton")

    def prefilled(rows):
        cache, seen = slot_cache(model, 64), torch.zeros(len(rows), 64, dtype=torch.long)
        seen[:, : mask.shape[1]] = mask[rows]
        positions = (mask[rows].cumsum(1) - 1).clamp(min=0)
        token = model(
            ids[rows],
            attention_mask=mask[rows],
            position_ids=positions,
            **{hf_models.cache_argument(model): cache},
        ).logits[:, -1:].argmax(-1)
        return Step(model, cache), seen, token, positions[:, -1:]

    step, seen, token, positions = prefilled([0, 1])
    first = seen.clone()
    first[:, mask.shape[1]] = 1
    torch.export.save(
        torch.export.export(step, (token, first, positions + 1), strict=False), tmp_path / "step.pt2"
    )
    exported = torch.export.load(tmp_path / "step.pt2").module()
    # Other queries than those it was exported with, of other lengths.
    step, seen, token, positions = prefilled([4, 5])
    exported.load_state_dict(step.state_dict(), strict=False)
    for column in range(mask.shape[1], mask.shape[1] + 5):
        seen[:, column], positions = 1, positions + 1
        want = step(token, seen, positions)
        assert torch.equal(exported(token, seen, positions), want)
        token = want[:, -1:].argmax(-1)


# ---- the relay on any model


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


# ---- the slot cache


def test_rows_come_and_go():
    """Insert, merge and select change nothing that stays, bit by bit, and every query goes on as if
    it had run in a batch of its own."""
    model, (ids, mask) = make("qwen3"), prompts()
    model.set_attn_implementation("baton")
    name = hf_models.cache_argument(model)

    def prefill(rows, padded):
        cache = slot_cache(model, 96)
        if padded:
            prompt, seen = ids[rows], mask[rows]
        else:
            prompt = ids[rows][:, mask[rows][0].bool()]
            seen = torch.ones_like(prompt)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        out = model(prompt, attention_mask=seen, position_ids=positions, **{name: cache})
        return cache, seen, out.logits[:, -1:].argmax(-1)

    def steps(cache, seen, token, answers, count):
        for _ in range(count):
            for answer, row in zip(answers, token[:, 0].tolist(), strict=True):
                answer.append(row)
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            positions = seen.sum(1, keepdim=True) - 1
            token = model(
                token, attention_mask=seen, position_ids=positions, **{name: cache}
            ).logits[:, -1:].argmax(-1)
        return seen, token

    answers = {row: [] for row in range(6)}
    with torch.inference_mode():
        cache, seen, token = prefill([1, 3], padded=True)
        order = [1, 3]
        seen, token = steps(cache, seen, token, [answers[r] for r in order], 3)
        # A newcomer longer than the batch takes the place of row 0.
        kept = [layer.keys[1][:, seen[1].bool().nonzero()[:, 0]].clone() for layer in cache.layers]
        other, _, first = prefill([2], padded=False)
        seen = cache.insert(other, 0, seen)
        for layer, before in zip(cache.layers, kept, strict=True):
            assert torch.equal(layer.keys[1][:, seen[1].bool().nonzero()[:, 0]], before)
        token[0], order[0] = first[0], 2
        seen, token = steps(cache, seen, token, [answers[r] for r in order], 4)
        # A batch of two joins, one of them padded.
        other, other_seen, first = prefill([0, 5], padded=True)
        seen = cache.merge(other, seen, other_seen)
        token, order = torch.cat([token, first]), [*order, 0, 5]
        seen, token = steps(cache, seen, token, [answers[r] for r in order], 5)
        # The longest leaves, and its columns with it.
        rows = [3, 1]
        length = seen.shape[1]
        seen = cache.select(rows, seen)
        assert seen.shape[1] == max(8 + 5, 12 + 12) < length
        token, order = token[rows], [order[row] for row in rows]
        steps(cache, seen, token, [answers[r] for r in order], 4)
    want = expected("qwen3").tolist()
    assert {row: answer for row, answer in answers.items() if answer} == {
        row: want[row][: len(answer)] for row, answer in answers.items() if answer
    }
    assert [len(answers[row]) for row in range(6)] == [5, 3, 9, 16, 0, 9]


def filled(rows=2, tokens=5, capacity=8, name="llama"):
    model = make(name)
    model.set_attn_implementation("baton")
    cache = slot_cache(model, capacity)
    with torch.inference_mode():
        model(
            torch.randint(5, 300, (rows, tokens)), **{hf_models.cache_argument(model): cache}
        )
    return cache, torch.ones(rows, tokens, dtype=torch.long)


def test_repeat_crop_and_reset():
    cache, _ = filled()
    keys = [layer.keys[:, :, :5].clone() for layer in cache.layers]
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    for layer, before in zip(cache.layers, keys, strict=True):
        assert torch.equal(layer.keys[:, :, :5], before.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    for layer, before in zip(cache.layers, keys, strict=True):
        assert torch.equal(layer.keys[:, :, :5], before.flip(0))
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0


def test_memory_is_not_that_of_the_capacity():
    cache, _ = filled(capacity=1 << 16)
    layer = cache.layers[0]
    assert layer._memory.bytes_reserved >= 2 * 2 * 2 * (1 << 16) * 16 * 4


BAD_CALLS = {
    "capacity": (lambda c, m: slot_cache(make("llama"), 0), "capacity must be at least 1"),
    "full": (
        lambda c, m: c.update(*(torch.zeros(2, 2, 4, 16) for _ in range(2)), 0),
        "at most 8, the capacity, got 9",
    ),
    "rows": (
        lambda c, m: c.update(*(torch.zeros(3, 2, 1, 16) for _ in range(2)), 0),
        "rows must be 2, got 3",
    ),
    "crop": (lambda c, m: c.crop(-6), "from -5 to 0, got -6"),
    "insert several": (lambda c, m: c.insert(filled()[0], 0, m), "other must have 1 row, got 2"),
    "insert nowhere": (lambda c, m: c.insert(filled(1)[0], 2, m), "row must be"),
    "insert too long": (
        lambda c, m: c.insert(filled(1, 9, 16)[0], 0, m),
        "other must have at most 8 tokens, the capacity, got 9",
    ),
    "mask": (
        lambda c, m: c.insert(filled(1)[0], 0, m[:, 1:]),
        r"attention_mask must be of shape \[2, 5\], got \[2, 4\]",
    ),
    "other mask": (
        lambda c, m: c.merge(filled(1)[0], m, m),
        r"other_mask must be of shape \[1, 5\], got \[2, 5\]",
    ),
    "empty": (
        lambda c, m: c.merge(slot_cache(make("llama"), 8), m),
        "other must be a SlotCache with rows",
    ),
    "other kind": (lambda c, m: c.merge(DynamicCache(), m), "other must be a SlotCache with rows"),
    "other model": (
        lambda c, m: c.merge(filled(name="gpt_neox")[0], m),
        "other must be of the same model",
    ),
    "no rows": (lambda c, m: c.select([], m), "rows must be at least one row"),
    "no such row": (lambda c, m: c.select([2], m), "rows must be"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_change_nothing(case):
    call, message = BAD_CALLS[case]
    cache, mask = filled()
    before = [layer.keys[:, :, :5].clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=message):
        call(cache, mask)
    assert cache.get_seq_length() == 5 and cache.batch_size == 2
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :5], keys)


def test_layers_of_another_kind_are_refused():
    with pytest.raises(NotImplementedError, match="layer_types of the config must be"):
        slot_cache(make("llama4"), 8)


def test_sdpa_is_what_it_was():
    """Registering adds a name and leaves the others alone."""
    from transformers import AttentionInterface

    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
