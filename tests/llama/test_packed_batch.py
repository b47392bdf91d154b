"""PackedBatch: which tokens a pass computes, and where their keys and values go."""

import dataclasses

import pytest
import torch

from baton_engines import PackedBatch
from baton_kernels import BatchShape

HOST_FIELDS = ("query_lengths", "total_lengths", "max_query_length", "max_length", "padding")


def ragged_shape() -> BatchShape:
    """Slot 0 holds 6 tokens, slot 1 is free, slot 2 holds 3."""
    shape = BatchShape(4, 16)
    shape.allocate(6, 0)
    shape.allocate(3, 2)
    return shape


def numbers(batch: PackedBatch) -> dict[str, list[int]]:
    return {
        field.name: getattr(batch, field.name).tolist()
        for field in dataclasses.fields(batch)
        if field.name not in HOST_FIELDS
    }


def test_the_example_of_the_docstring() -> None:
    batch = PackedBatch.from_shape(ragged_shape(), [0, 2], [1, 3])
    assert numbers(batch) == {
        "cu_seqlens_q": [0, 1, 4],
        "slots": [0, 2],
        "starts": [0, 0],
        "lengths": [6, 3],
        "token_slots": [0, 2, 2, 2],
        "token_columns": [5, 0, 1, 2],
        "positions": [5, 0, 1, 2],
        "last_tokens": [0, 3],
    }
    assert (batch.query_lengths, batch.total_lengths) == ((1, 3), (6, 3))
    assert (batch.max_query_length, batch.max_length) == (3, 6)
    assert (batch.num_rows, batch.total_tokens) == (2, 4)


def test_aligned_rows_have_columns_apart_from_positions() -> None:
    shape = BatchShape(4, 16, aligned=True)
    shape.allocate(6, 0)
    shape.allocate(3, 2)
    batch = PackedBatch.from_shape(shape, [2, 0], [2, 1])
    assert batch.starts.tolist() == [3, 0]
    assert batch.token_slots.tolist() == [2, 2, 0]
    assert batch.token_columns.tolist() == [4, 5, 5]
    assert batch.positions.tolist() == [1, 2, 5]


def test_without_query_lengths_every_row_decodes_one_token() -> None:
    batch = PackedBatch.from_shape(ragged_shape(), (2, 0))
    assert batch.cu_seqlens_q.tolist() == [0, 1, 2]
    assert batch.positions.tolist() == [2, 5]
    assert batch.max_query_length == 1


def test_the_tensors_are_what_the_ops_take() -> None:
    batch = PackedBatch.from_shape(ragged_shape(), [0, 2], [2, 3])
    for field in dataclasses.fields(batch):
        if field.name not in HOST_FIELDS:
            tensor = getattr(batch, field.name)
            assert (tensor.dtype, tensor.dim()) == (torch.int32, 1), field.name
            assert tensor.is_contiguous(), field.name


def test_padded_rows_compute_as_many_tokens_as_the_longest() -> None:
    batch = PackedBatch.from_shape(ragged_shape(), [0, 2], [1, 3], padded=True)
    # The decoder's two padding tokens have the columns and positions of its next two tokens.
    assert numbers(batch) == {
        "cu_seqlens_q": [0, 3, 6],
        "slots": [0, 2],
        "starts": [0, 0],
        "lengths": [8, 3],
        "token_slots": [0, 0, 0, 2, 2, 2],
        "token_columns": [5, 6, 7, 0, 1, 2],
        "positions": [5, 6, 7, 0, 1, 2],
        "last_tokens": [0, 5],
    }
    assert (batch.query_lengths, batch.total_lengths) == ((1, 3), (6, 3))
    assert batch.padding == (2, 0) and batch.total_tokens == 6
    assert (batch.max_query_length, batch.max_length) == (3, 8)


def test_padding_needs_columns() -> None:
    shape = BatchShape(2, 8)
    shape.allocate(6, 0)
    shape.allocate(4, 1)
    with pytest.raises(ValueError, match="padding must be within the capacity 8, got 9 columns"):
        PackedBatch.from_shape(shape, [0, 1], [1, 4], padded=True)


@pytest.mark.parametrize(
    ("slots", "query_lengths", "message"),
    [
        ([], [], "slots must be at least one slot, got none"),
        ([0, 0], [1, 1], "slots must be distinct, got [0, 0]"),
        ([1], [1], "slot must be in use, got 1"),
        ([0, 2], [1], "query_lengths must be one per slot (2), got 1"),
        ([0], [0], "from 1 to the length of the row in slot 0 (6), got 0"),
        ([0, 2], [1, 4], "from 1 to the length of the row in slot 2 (3), got 4"),
    ],
)
def test_bad_rows(slots: list[int], query_lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PackedBatch.from_shape(ragged_shape(), slots, query_lengths)
    assert message in str(caught.value)
