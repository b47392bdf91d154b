import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_kernels.batch_shape import BatchShape, Moves

BOTH = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])


def rows(shape):
    return {slot: (shape.start(slot), shape.end(slot)) for slot in shape.used}


def drawn(aligned):
    """The shape in the drawing: five tokens in slot 0, three in slot 2."""
    shape = BatchShape(3, 8, aligned=aligned)
    shape.allocate(5, 0)
    shape.allocate(3, 2)
    return shape


def test_drawing_aligned():
    shape = drawn(True)
    assert shape.width == 5
    assert rows(shape) == {0: (0, 5), 2: (2, 5)}
    slot, moves = shape.allocate(7)
    assert slot == 1
    assert moves == Moves((0, 2), (0, 2), (0, 2), (2, 4), (5, 3))
    assert shape.width == 7
    assert rows(shape) == {0: (2, 7), 1: (0, 7), 2: (4, 7)}


def test_drawing_ragged():
    shape = drawn(False)
    assert shape.width == 5
    assert rows(shape) == {0: (0, 5), 2: (0, 3)}
    assert shape.allocate(7) == (1, Moves())
    assert shape.width == 7
    assert rows(shape) == {0: (0, 5), 1: (0, 7), 2: (0, 3)}


def test_moves_is_frozen_and_false_when_empty():
    assert not Moves()
    moves = Moves((0,), (1,), (0,), (2,), (3,))
    assert moves
    with pytest.raises(dataclasses.FrozenInstanceError):
        moves.lengths = ()


@BOTH
def test_fresh(aligned):
    shape = BatchShape(3, 8, aligned=aligned)
    assert (shape.num_slots, shape.capacity, shape.aligned) == (3, 8, aligned)
    assert (shape.width, shape.used, shape.num_free) == (0, (), 3)
    assert not shape.trim()
    assert not shape.extend([])


@BOTH
def test_slots_are_taken_from_the_lowest_and_used_ascending(aligned):
    shape = BatchShape(4, 8, aligned=aligned)
    assert shape.allocate(1, 3)[0] == 3
    assert shape.allocate(1)[0] == 0
    assert shape.allocate(1)[0] == 1
    shape.free(0)
    assert shape.used == (1, 3)
    assert shape.num_free == 2
    assert [shape.allocate(1)[0], shape.allocate(1)[0]] == [0, 2]
    assert shape.used == (0, 1, 2, 3)
    assert shape.num_free == 0


def test_ragged_rows_extend_apart():
    shape = drawn(False)
    assert not shape.extend([2, 0], [3, 1])
    assert rows(shape) == {0: (0, 6), 2: (0, 6)}
    assert not shape.extend([0])
    assert rows(shape) == {0: (0, 7), 2: (0, 6)}
    assert not shape.extend([2], [0])
    assert not shape.extend([0, 2], (n for n in (1, 2)))
    assert rows(shape) == {0: (0, 8), 2: (0, 8)}
    assert shape.width == 8


def test_aligned_rows_extend_together_and_shift_left_at_the_capacity():
    shape = drawn(True)
    assert not shape.extend([2, 0])
    assert not shape.extend([0, 2], [2, 2])
    assert rows(shape) == {0: (0, 8), 2: (2, 8)}
    shape.free(0)
    # Two columns of padding were left, and both are dropped at once.
    assert shape.extend([2]) == Moves((2,), (2,), (2,), (0,), (6,))
    assert rows(shape) == {2: (0, 7)}
    assert not shape.extend([2])
    with pytest.raises(ValueError, match=r"counts must be at most 0 within the capacity 8, got 1"):
        shape.extend([2])


def test_aligned_width_falls_only_with_the_last_row_or_a_trim():
    shape = drawn(True)
    shape.free(0)
    assert shape.width == 5
    assert shape.trim() == Moves((2,), (2,), (2,), (0,), (3,))
    assert rows(shape) == {2: (0, 3)}
    assert not shape.trim()
    shape.free(2)
    assert shape.width == 0


def test_ragged_trim_and_free_move_nothing():
    shape = drawn(False)
    shape.free(0)
    assert shape.width == 3
    assert not shape.trim()
    shape.free(2)
    assert shape.width == 0


def test_empty_rows_ragged():
    shape = BatchShape(2, 4)
    shape.allocate(0)
    assert rows(shape) == {0: (0, 0)}
    shape.extend([0], [4])
    assert rows(shape) == {0: (0, 4)}


def test_empty_rows_follow_an_aligned_width():
    shape = drawn(True)
    assert shape.allocate(0) == (1, Moves())
    assert rows(shape)[1] == (5, 5)
    shape.extend([0, 2])
    assert rows(shape)[1] == (6, 6)
    shape.extend([0, 1, 2])
    assert rows(shape) == {0: (0, 7), 1: (6, 7), 2: (2, 7)}
    shape.free(0)
    shape.free(2)
    assert shape.trim() == Moves((1,), (6,), (1,), (0,), (1,))
    shape.free(1)

    # The only row has no padding to keep, and nothing to move.
    shape.allocate(8, 0)
    shape.allocate(0, 1)
    shape.free(0)
    assert rows(shape) == {1: (8, 8)}
    assert not shape.copy().trim()
    assert not shape.extend([1])
    assert rows(shape) == {1: (0, 1)}


@BOTH
def test_row_as_long_as_the_capacity(aligned):
    shape = drawn(aligned)
    slot, moves = shape.allocate(8)
    assert rows(shape)[slot] == (0, 8)
    assert bool(moves) == aligned


@BOTH
def test_tensors(aligned):
    shape = drawn(aligned)
    for tensor, expected in zip(
        shape.tensors([2, 0]), ([2, 0], [2, 0] if aligned else [0, 0], [3, 5]), strict=True
    ):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.tolist() == expected
    rows = shape.tensors([2, 0])
    assert [rows.slots, rows.starts, rows.lengths] == list(rows)
    assert list(rows._asdict()) == ["slots", "starts", "lengths"]
    for tensor in shape.tensors([]):
        assert tensor.dtype == torch.int32
        assert tensor.shape == (0,)
    assert shape.tensors(shape.used, device="meta")[0].device.type == "meta"


@BOTH
def test_copy_equality_assign_and_repr(aligned):
    shape = drawn(aligned)
    other = shape.copy()
    assert other == shape
    other.extend([0, 2])
    assert other != shape
    assert shape == drawn(aligned)
    shape.assign(other)
    assert shape == other
    other.free(0)
    assert shape.used == (0, 2)
    assert shape != BatchShape(3, 8, aligned=not aligned)
    assert shape != "a shape"
    with pytest.raises(TypeError, match="unhashable"):
        hash(shape)
    end = "[2, 6)" if aligned else "[0, 4)"
    assert repr(shape) == (
        f"BatchShape(num_slots=3, capacity=8, aligned={aligned}, width=6, "
        f"rows={{0: [0, 6), 2: {end}}})"
    )


def test_equality_sees_the_width():
    one, other = drawn(True), drawn(True)
    one.free(0)
    other.free(0)
    other.trim()
    assert one != other


@BOTH
def test_resize(aligned):
    shape = drawn(aligned)
    before = rows(shape)
    shape.resize(5)
    assert (shape.num_slots, shape.num_free, rows(shape)) == (5, 3, before)
    assert shape.allocate(1, 4)[0] == 4
    shape.free(4)
    shape.resize(3)
    assert rows(shape) == before
    with pytest.raises(ValueError, match=r"BatchShape.resize: num_slots must be at least 3"):
        shape.resize(2)
    shape.free(2)
    shape.resize(1)
    assert (shape.num_slots, shape.used) == (1, (0,))


def test_integer_likes_are_accepted():
    shape = BatchShape(torch.tensor(2), torch.tensor(8))
    slot, _ = shape.allocate(torch.tensor(3), torch.tensor(1))
    shape.extend(torch.tensor([1]), torch.tensor([2]))
    assert (slot, type(slot), shape.length(1)) == (1, int, 5)


@pytest.mark.parametrize(
    ("error", "sizes", "text"),
    [
        (ValueError, (0, 8), "num_slots must be from 1 to 2147483647, got 0"),
        (ValueError, (3, 0), "capacity must be from 1 to 2147483647, got 0"),
        (ValueError, (3, 2**31), "capacity must be from 1 to 2147483647, got 2147483648"),
        (TypeError, (3.0, 8), "num_slots must be an integer, got 3.0"),
    ],
)
def test_bad_sizes(error, sizes, text):
    with pytest.raises(error, match=rf"^BatchShape: {text}$"):
        BatchShape(*sizes)


REFUSED = [
    ("allocate", (9,), ValueError, "length must be from 0 to 8, got 9"),
    ("allocate", (-1,), ValueError, "length must be from 0 to 8, got -1"),
    ("allocate", (1.5,), TypeError, "length must be an integer, got 1.5"),
    ("allocate", (8, 3), ValueError, "slot must be from 0 to 2, got 3"),
    ("allocate", (8, -1), ValueError, "slot must be from 0 to 2, got -1"),
    ("allocate", (8, 2), ValueError, "slot must be free, got 2"),
    ("allocate", (8, "1"), TypeError, "slot must be an integer, got '1'"),
    ("extend", ([0, 1, 2],), ValueError, "slot must be in use, got 1"),
    ("extend", ([0, 2, 7],), ValueError, "slot must be in use, got 7"),
    ("extend", ([0, 2, 2],), ValueError, r"slots must be distinct, got \[0, 2, 2\]"),
    ("extend", ([0, 2], [1]), ValueError, r"counts must be one per slot \(2\), got 1"),
    ("extend", ([0, 2], [1, -1]), ValueError, "counts must be at least 0, got -1"),
    ("extend", ([0, 2], [1, None]), TypeError, "counts must be an integer, got None"),
    ("extend", ([0, 2], [4, 4]), ValueError, "counts must be .* the capacity 8, got"),
    ("free", (1,), ValueError, "slot must be in use, got 1"),
    ("free", (-1,), ValueError, "slot must be in use, got -1"),
    ("start", (1,), ValueError, "slot must be in use, got 1"),
    ("length", (1,), ValueError, "slot must be in use, got 1"),
    ("end", (1,), ValueError, "slot must be in use, got 1"),
    ("tensors", ([0, 1],), ValueError, "slot must be in use, got 1"),
    ("resize", (2,), ValueError, "num_slots must be at least 3 .*, got 2"),
    ("resize", (0,), ValueError, "num_slots must be from 1 to 2147483647, got 0"),
]
REFUSED_ALIGNED = [
    ("extend", ([0],), ValueError, r"slots must be all rows with tokens .*, got \[0\] without"),
    ("extend", ([],), ValueError, r"slots must be all rows .*, got \[\] without \[0, 2\]"),
    ("extend", ([0, 2], [1, 2]), ValueError, r"counts must be equal .*, got \[1, 2\]"),
]


@pytest.mark.parametrize(
    ("aligned", "method", "arguments", "error", "text"),
    [(aligned, *row) for aligned in (False, True) for row in REFUSED]
    + [(True, *row) for row in REFUSED_ALIGNED],
)
def test_refusals_change_nothing(aligned, method, arguments, error, text):
    shape = drawn(aligned)
    with pytest.raises(error, match=rf"^BatchShape.{method}: {text}"):
        getattr(shape, method)(*arguments)
    assert shape == drawn(aligned)


@BOTH
def test_a_full_batch_takes_no_more(aligned):
    shape = drawn(aligned)
    shape.allocate(1)
    before = shape.copy()
    with pytest.raises(ValueError, match=r"BatchShape.allocate: num_slots must be .*, got 3"):
        shape.allocate(8)
    assert shape == before


def perform(grid, moves):
    """The moves on a grid of {(slot, column): token}; sources are read before targets are
    written."""
    spots = [
        ((source_slot, source + t), (target_slot, target + t))
        for source_slot, source, target_slot, target, length in zip(
            *dataclasses.astuple(moves), strict=True
        )
        for t in range(length)
    ]
    targets = [target for _, target in spots]
    assert len(set(targets)) == len(targets), "two targets overlap"
    for source, target in spots:
        others = {spot for spot, _ in spots if spot[0] != source[0]}
        assert target not in others, "a target overlaps the source of another move"
    grid.update({target: grid[source] for source, target in spots})


STEPS = st.lists(
    st.tuples(st.sampled_from("aaeeeeft"), st.integers(0, 9), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


@BOTH
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(steps=STEPS)
def test_tokens_stay_with_their_rows(aligned, steps):
    """After any events, moves carry a row's tokens to where the shape says they are."""
    shape, grid, model = BatchShape(4, 9, aligned=aligned), {}, {}
    for number, (kind, amount, choice) in enumerate(steps):
        before = shape.copy()
        try:
            if kind == "a":
                slot, moves = shape.allocate(amount)
                model[slot], written = [], {slot: amount}
            elif kind == "e":
                slots = shape.used if aligned else shape.used[choice:]
                moves = shape.extend(slots, [amount % 4] * len(slots))
                written = dict.fromkeys(slots, amount % 4)
            elif kind == "f" and shape.used:
                slot = shape.used[choice % len(shape.used)]
                shape.free(slot)
                del model[slot]
                moves, written = Moves(), {}
            else:
                moves, written = shape.trim(), {}
        except ValueError:
            assert shape == before
            continue
        perform(grid, moves)
        for slot, count in written.items():
            tokens = [(number, slot, t) for t in range(count)]
            first = shape.end(slot) - count
            grid.update({(slot, first + t): token for t, token in enumerate(tokens)})
            model[slot] += tokens
        assert shape.used == tuple(sorted(model))
        for slot, tokens in model.items():
            assert 0 <= shape.start(slot) <= shape.end(slot) <= shape.width <= shape.capacity
            assert [grid[slot, c] for c in range(shape.start(slot), shape.end(slot))] == tokens
            assert shape.length(slot) == len(tokens)
            assert shape.end(slot) == shape.width if aligned else shape.start(slot) == 0
