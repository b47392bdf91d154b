"""A transformers cache in slots: in-place appends, and rows that enter and leave between steps."""

from __future__ import annotations

import psutil
import pytest
import torch
from hf_models import expected, generate, make, prompts
from transformers import DynamicCache

from baton_engines.huggingface import cache_argument, slot_cache


def test_rows_come_and_go():
    """insert, merge and select do not change the rows that stay, bit by bit, and every query goes
    on as if it had run in a separate batch."""
    model, (ids, mask) = make("qwen3"), prompts()
    model.set_attn_implementation("baton")
    name = cache_argument(model)

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
            token = (
                model(token, attention_mask=seen, position_ids=positions, **{name: cache})
                .logits[:, -1:]
                .argmax(-1)
            )
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
        # The longest row leaves, and the columns that only it used are dropped.
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
        model(torch.randint(5, 300, (rows, tokens)), **{cache_argument(model): cache})
    return cache, torch.ones(rows, tokens, dtype=torch.long)


def test_rows_change_outside_of_the_inference_mode_that_filled_them():
    cache, seen = filled()
    with torch.inference_mode():
        other, other_seen = filled(rows=1, tokens=3)
    seen = cache.insert(other, 0, seen, other_seen)
    seen = cache.merge(other, seen, other_seen)
    assert torch.equal(cache.layers[1].keys[2, :, 2:5], other.layers[1].keys[0, :, :3])
    cache.select([2, 0], seen)
    cache.crop(-1)
    cache.reset()


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
    """Address space for a gigabyte of keys and values, but pages only for the few columns in
    use."""
    process = psutil.Process()
    before = process.memory_info().rss
    cache, _ = filled(capacity=1 << 19)
    assert sum(layer._memory.bytes_reserved for layer in cache.layers) >= 1 << 30
    assert process.memory_info().rss - before < 1 << 28


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


# ---- sliding windows


def long_prompts():
    """Longer than the window of 8 by several pages, of 64 columns in the small models."""
    return prompts((300, 3, 170, 90))


@pytest.mark.parametrize("name", ["gemma3", "mistral_window", "gpt_oss_sinks", "qwen2_window"])
def test_tokens_behind_the_window_are_given_back(name):
    model, (ids, mask) = make(name), long_prompts()
    cache = slot_cache(model, 512)
    got = generate(model, "baton", ids, mask, 80, cache=cache)
    assert torch.equal(got, generate(model, "eager", ids, mask, 80))
    windows = [layer.window for layer in cache.layers]
    assert set(windows) <= {8, None} and 8 in windows
    for layer in cache.layers:
        # Less than a page more than what the next token sees.
        least = 0 if layer.window is None else 379 - 7 - 64
        assert least <= layer.released <= max(379 - 7, 0) if layer.window else not layer.released


def test_a_sliding_layer_takes_the_memory_of_its_window():
    config = make("gemma3").config
    capacity, rows = 1 << 15, 4
    cache = slot_cache(make("gemma3"), capacity)
    assert all(kind == "sliding_attention" for kind in config.layer_types)
    process = psutil.Process()
    few = torch.randn(rows, 2, 1024, 16)
    before = process.memory_full_info().uss
    for _ in range(capacity // 1024):
        for layer in range(config.num_hidden_layers):
            cache.update(few, few, layer)
    cache.trim()
    all_bytes = config.num_hidden_layers * rows * 2 * 2 * capacity * 16 * 4
    assert all_bytes == 1 << 27
    assert process.memory_full_info().uss - before < all_bytes // 8


def test_rows_come_and_go_behind_the_window():
    """After memory was released, insert, merge, select and crop give a separate batch's answers."""
    model = make("gemma3")
    model.set_attn_implementation("baton")
    name = cache_argument(model)
    (ids, mask), (short, short_mask) = long_prompts(), prompts((200, 100))

    def forward(cache, tokens, seen):
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model(tokens, attention_mask=seen, position_ids=positions, **{name: cache})
        return out.logits[:, -1:].argmax(-1)

    def grown(seen):
        return torch.cat([seen, seen.new_ones(len(seen), 1)], 1)

    with torch.inference_mode():
        cache, other = slot_cache(model, 512), slot_cache(model, 512)
        token = forward(cache, ids, mask)
        first = forward(other, short, short_mask)
        for layer in (*cache.layers, *other.layers):
            layer.trim()
            assert layer.released > 64
        seen = cache.merge(other, mask, short_mask)
        token = torch.cat([token, first])
        alone, alone_seen, alone_token = other, short_mask, first
        for _ in range(3):
            seen, alone_seen = grown(seen), grown(alone_seen)
            token = forward(cache, token, seen)
            alone_token = forward(alone, alone_token, alone_seen)
            assert torch.equal(token[4:], alone_token)
        # The longest row leaves, and the columns that only it used are dropped.
        rows = [4, 5, 2]
        seen, token = cache.select(rows, seen), token[rows]
        lone = slot_cache(model, 512)
        lone_token = forward(lone, ids[:1], mask[:1])
        # A longer newcomer moves the others to the right.
        seen = cache.insert(lone, 2, seen, mask[:1])
        token = torch.cat([token[:2], lone_token])
        lone_seen = mask[:1]
        for _ in range(3):
            seen, alone_seen, lone_seen = grown(seen), grown(alone_seen), grown(lone_seen)
            token = forward(cache, token, seen)
            alone_token = forward(alone, alone_token, alone_seen)
            lone_token = forward(lone, lone_token, lone_seen)
            assert torch.equal(token, torch.cat([alone_token, lone_token]))


def test_speculation_keeps_what_it_may_need_again():
    cache = slot_cache(make("gemma3"), 512)
    keys = torch.randn(1, 2, 300, 16)
    for layer in range(4):
        cache.update(keys, keys, layer)
    cache.trim()
    before = cache.get_seq_length().clone()
    with pytest.raises(ValueError, match=r"tokens_to_remove must be from 0 to 0, got -1; before"):
        cache.crop(-1)
    assert all(layer.get_seq_length() == before for layer in cache.layers)
    cache.activate_past_recording()
    for layer in range(4):
        cache.update(keys[:, :, :200], keys[:, :, :200], layer)
    cache.crop(-150)
    assert cache.get_seq_length() == 350
    assert torch.equal(cache.layers[0].keys[:, :, 343:350], keys[:, :, 43:50])
    with pytest.raises(ValueError, match=r"from -50 to 0, got -51"):
        cache.crop(-51)
    cache.reset()
    assert cache.layers[0].released == 0
