"""RotaryTable: the model's own cos and sin, for each query as if it were decoded by itself."""

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from baton_engines import PackedBatch
from baton_engines.llama.rope import RotaryTable
from baton_kernels import BatchShape

HEAD_DIM = 32
MAX_POSITIONS = 24
THETA = {"rope_theta": 10_000.0}
ROPE_PARAMETERS = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
        **THETA,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 6,
        **THETA,
    },
}
STATIC = [name for name in ROPE_PARAMETERS if name != "dynamic"]


def rotary_module(rope_type: str) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=dict(ROPE_PARAMETERS[rope_type]),
    )
    return LlamaRotaryEmbedding(config)


def batch_of(lengths: list[int], query_lengths: list[int]) -> PackedBatch:
    shape = BatchShape(len(lengths), 4096)
    slots = [shape.allocate(length)[0] for length in lengths]
    return PackedBatch.from_shape(shape, slots, query_lengths)


def by_module(module: LlamaRotaryEmbedding, begin: int, end: int) -> torch.Tensor:
    """cos and sin, stacked, of one call of the module, half a head wide."""
    both = module(torch.empty(0), torch.arange(begin, end)[None])
    return torch.stack([part[0, :, : HEAD_DIM // 2] for part in both])


def by_table(table: RotaryTable, batch: PackedBatch) -> list[torch.Tensor]:
    """cos and sin, stacked, of each row."""
    return list(torch.stack(table(batch)).split(batch.query_lengths, dim=1))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # The same frequencies; cos and sin of a whole block may round the last bit differently.
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("rope_type", STATIC)
def test_static_types_are_the_modules_own(rope_type: str) -> None:
    module = rotary_module(rope_type)
    table = RotaryTable(module, HEAD_DIM)
    lengths, query_lengths = [5, 70, 1500], [5, 1, 600]
    rows = by_table(table, batch_of(lengths, query_lengths))
    for row, length, count in zip(rows, lengths, query_lengths, strict=True):
        assert row.dtype == torch.float32
        assert_same(row, by_module(module, length - count, length))


def test_yarn_scales_cos_and_sin() -> None:
    module = rotary_module("yarn")
    assert module.attention_scaling > 1
    row = by_table(RotaryTable(module, HEAD_DIM), batch_of([1], [1]))[0]
    torch.testing.assert_close(row[0], torch.full_like(row[0], module.attention_scaling))


def test_dynamic_follows_each_query_as_when_decoded_alone() -> None:
    # Prompts below, at and above the trained length, then decoded past it side by side.
    prompts = [3, MAX_POSITIONS - 1, MAX_POSITIONS, MAX_POSITIONS + 1, 40]
    alone = [rotary_module("dynamic") for _ in prompts]
    table = RotaryTable(rotary_module("dynamic"), HEAD_DIM)
    rows = by_table(table, batch_of(prompts, prompts))
    for row, module, length in zip(rows, alone, prompts, strict=True):
        assert_same(row, by_module(module, 0, length))
    for step in range(1, 30):
        lengths = [length + step for length in prompts]
        rows = by_table(table, batch_of(lengths, [1] * len(lengths)))
        for row, module, length in zip(rows, alone, lengths, strict=True):
            assert_same(row, by_module(module, length - 1, length))


def test_padding_changes_no_row() -> None:
    """Dynamic frequencies are those of a row's own last token, not of its padding."""
    lengths, query_lengths = [90, 70, 3], [1, 40, 3]
    shape = BatchShape(3, 4096)
    slots = [shape.allocate(length)[0] for length in lengths]
    padded = PackedBatch.from_shape(shape, slots, query_lengths, padded=True)
    table = RotaryTable(rotary_module("dynamic"), HEAD_DIM)
    rows = torch.stack(table(padded)).split(40, dim=1)
    alone = by_table(table, batch_of(lengths, query_lengths))
    for row, count, other in zip(rows, query_lengths, alone, strict=True):
        assert torch.equal(row[:, :count], other)


def test_dynamic_uses_the_frequencies_of_the_exact_length() -> None:
    first, second = (
        by_table(RotaryTable(rotary_module("dynamic"), HEAD_DIM), batch_of([length], [30]))[0]
        for length in (60, 61)
    )
    assert not torch.allclose(first[:, 1:], second[:, :-1], atol=1e-4)


@pytest.mark.parametrize("rope_type", list(ROPE_PARAMETERS))
def test_bits_depend_on_the_query_alone(rope_type: str) -> None:
    lengths, query_lengths = [3, 90, 50, 1100, 24], [3, 1, 20, 1, 1]
    together = by_table(
        RotaryTable(rotary_module(rope_type), HEAD_DIM), batch_of(lengths, query_lengths)
    )
    grown = RotaryTable(rotary_module(rope_type), HEAD_DIM)
    for row, length, count in zip(together, lengths, query_lengths, strict=True):
        assert torch.equal(by_table(grown, batch_of([length], [count]))[0], row)


@pytest.mark.parametrize("rope_type", list(ROPE_PARAMETERS))
def test_the_models_module_is_not_touched(rope_type: str) -> None:
    module = rotary_module(rope_type)
    before = copy.deepcopy(module)
    RotaryTable(module, HEAD_DIM)(batch_of([100], [50]))
    assert torch.equal(module.inv_freq, before.inv_freq)
    assert module.max_seq_len_cached == before.max_seq_len_cached


def test_frequencies_that_a_cast_has_rounded_stay_the_modules_own() -> None:
    module = rotary_module("default").to(torch.bfloat16)
    row = by_table(RotaryTable(module, HEAD_DIM), batch_of([200], [200]))[0]
    assert_same(row, by_module(module, 0, 200))


def test_what_is_not_supported() -> None:
    module = rotary_module("default")
    module.rope_type = "longrope"
    with pytest.raises(
        NotImplementedError, match="default, linear, dynamic, llama3, yarn, got 'lo"
    ):
        RotaryTable(module, HEAD_DIM)
    with pytest.raises(NotImplementedError, match=r"the whole head \(64\), got 32"):
        RotaryTable(rotary_module("default"), 64)
