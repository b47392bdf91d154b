"""Arguments that share memory with what a call writes, and others that only a fuzzer thinks of.

Each of these was accepted once, and then wrote outside its tensors, gave a result that depended on
the order of its copies, or did not end. tests/support/hostile_calls.py found them.
"""

import pytest
import torch

from baton_kernels.testing import assert_same_bits, int32, storage

ops = torch.ops.baton_kernels
SLOTS, HEADS, CAPACITY, DIM = 3, 2, 8, 16


def caches() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (SLOTS, HEADS, CAPACITY, DIM)
    return {name: torch.randn(shape, generator=generator) for name in ("key_cache", "value_cache")}


def inside(cache: torch.Tensor, values: list[int]) -> torch.Tensor:
    """An index tensor whose memory is the cache's."""
    index = storage(cache).view(torch.int32)[5 : 5 + len(values)]
    return index.copy_(int32(values))


def insertion() -> dict:
    return {
        "key": torch.ones(2, HEADS, DIM), "value": torch.ones(2, HEADS, DIM), **caches(),
        "cu_seqlens": int32([0, 1, 2]), "slots": int32([0, 2]), "starts": int32([3, 1]),
    }  # fmt: skip


def appending() -> dict:
    return {
        "key": torch.ones(2, HEADS, DIM), "value": torch.ones(2, HEADS, DIM), **caches(),
        "slots": int32([0, 2]), "columns": int32([3, 1]), "query": torch.ones(2, HEADS, DIM),
        "cos": torch.ones(2, DIM), "sin": torch.ones(2, DIM),
    }  # fmt: skip


def moving() -> dict:
    return {
        **caches(), "source_slots": int32([0, 2]), "source_starts": int32([3, 1]),
        "target_slots": int32([1, 2]), "target_starts": int32([0, 3]), "lengths": int32([2, 2]),
    }  # fmt: skip


def extraction() -> dict:
    return {
        **caches(), "cu_seqlens": int32([0, 1, 4]), "slots": int32([0, 2]),
        "starts": int32([3, 1]), "total_tokens": 4,
        "key": torch.zeros(4, HEADS, DIM), "value": torch.zeros(4, HEADS, DIM),
    }  # fmt: skip


def attention() -> dict:
    return {
        "query": torch.ones(2, HEADS, DIM), **caches(), "cu_seqlens_q": int32([0, 1, 2]),
        "slots": int32([0, 2]), "starts": int32([3, 1]), "lengths": int32([2, 5]),
        "alibi_slopes": torch.ones(HEADS), "sinks": torch.ones(HEADS),
        "out": torch.zeros(2, HEADS, DIM), "lse": torch.zeros(2, HEADS),
    }  # fmt: skip


CALLS = {
    "insert_kv": (ops.insert_kv.default, insertion, ("key_cache", "value_cache")),
    "append_kv": (ops.append_kv.query, appending, ("key_cache", "value_cache")),
    "move_kv": (ops.move_kv.default, moving, ("key_cache", "value_cache")),
    "extract_kv": (ops.extract_kv.out, extraction, ("key", "value")),
    "ragged_attention": (ops.ragged_attention.lse_out, attention, ("out", "lse")),
}
SHARING = [
    pytest.param(op, written, other, id=f"{op}-{other}-in-{written}")
    for op, (_, make, results) in CALLS.items()
    for written in results
    for other, tensor in make().items()
    if isinstance(tensor, torch.Tensor) and other != written
]


@pytest.mark.parametrize(("op", "written", "other"), SHARING)
def test_what_is_written_shares_memory_with_no_other_argument(op, written, other):
    native, make, _ = CALLS[op]
    arguments = make()
    old, target = arguments[other], storage(arguments[written])
    if old.numel() * old.element_size() > target.numel() * target.element_size():
        # The smaller of the two lies in the larger one.
        written, other = other, written
        old, target = arguments[other], storage(arguments[written])
    place = target.view(torch.uint8)[: old.numel() * old.element_size()].view(old.dtype)
    arguments[other] = place.view(old.shape).copy_(old)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError, match="in memory apart from .*'s, got overlapping memory"):
        native(**arguments)
    for name, bits in before.items():
        assert_same_bits(arguments[name], bits, name)


def test_index_values_that_the_call_would_overwrite_are_refused():
    """They are checked first, and would be read again when other bits are in their place."""
    arguments = insertion()
    arguments["slots"] = inside(arguments["key_cache"], [0, 2])
    arguments["key"].view(torch.int32).fill_(1_000_000)
    with pytest.raises(ValueError, match="insert_kv: slots must be in memory apart from key_cache"):
        ops.insert_kv(**arguments)


@pytest.mark.parametrize("dimension", range(1, 5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_may_lie_between_each_others_elements(dimension, dtype):
    """Keys and values of one tensor, next to each other in any dimension but the last."""
    sizes = [SLOTS, HEADS, CAPACITY, DIM]
    memory = torch.zeros(*sizes[: dimension - 1], 2, *sizes[dimension - 1 :], dtype=dtype)
    key_cache, value_cache = memory.unbind(dimension - 1)
    key, value = torch.ones(2, 1, HEADS, DIM, dtype=dtype), torch.ones(1, HEADS, DIM, dtype=dtype)
    ops.insert_kv(key[0], 2 * value, key_cache, value_cache, None, int32([1]), int32([3]))
    assert key_cache.sum() == HEADS * DIM and value_cache.sum() == 2 * HEADS * DIM
    # One element further, and they meet.
    flat = storage(memory)
    shifted = flat[: flat.numel() - 8].as_strided(
        value_cache.shape, value_cache.stride(), key_cache.storage_offset() + 8
    )
    with pytest.raises(ValueError, match="value_cache must be in memory apart from key_cache's"):
        ops.insert_kv(key[0], value, key_cache, shifted, None, int32([1]), int32([3]))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**63 - 1])
def test_a_window_of_any_size_hides_nothing(window):
    starts, lengths = int32([0, 2]), int32([0, 5])
    assert_same_bits(
        ops.attention_mask(starts, lengths, 3, 7, torch.float32, window),
        ops.attention_mask(starts, lengths, 3, 7, torch.float32), "mask",
    )  # fmt: skip
    scores = torch.randn(2, 2, 3, 7)
    assert_same_bits(
        ops.masked_softmax(scores, starts, lengths, 1.0, window),
        ops.masked_softmax(scores, starts, lengths), "weights",
    )  # fmt: skip


def test_results_without_elements_take_no_time():
    many = 2**62
    none = int32([0])
    cache = torch.empty(many, 1, 1, 0, DIM)
    assert ops.attention_mask(None, none, many, 0).shape == (1, 1, many, 0)
    assert ops.masked_softmax(torch.empty(1, 1, many, 0), None, none).shape == (1, 1, many, 0)
    assert ops.silu_and_mul(torch.empty(many, 0)).shape == (many, 0)
    assert ops.linear(torch.empty(many, 0), torch.empty(0, 0)).shape == (many, 0)
    assert ops.linear_packed(torch.empty(many, 0), torch.empty(0, 0, 48), 0).shape == (many, 0)
    ops.move_kv(cache, cache.clone(), none, none, none, none, none)
    token = torch.empty(many, 0, 1, DIM)
    ops.insert_kv(token, token, cache, cache.clone(), int32([0, 0]), none, none, True)
    outputs = 2**52
    panels = torch.empty(-(-outputs // 48), 0, 48)
    ops.pack_linear(torch.empty(outputs, 0), panels)
    assert ops.unpack_linear(panels, outputs, 0).shape == (outputs, 0)


def test_lazily_negated_tensors_are_refused_where_an_op_writes():
    arguments = appending()
    arguments["value"] = torch._neg_view(arguments["value"])
    before = arguments["key_cache"].clone()
    with pytest.raises(ValueError, match="must hold their values, got one that is negated lazily"):
        ops.append_kv.query(**arguments)
    assert_same_bits(arguments["key_cache"], before, "key_cache")
    x = torch.randn(3, 8)
    assert_same_bits(ops.silu_and_mul(torch._neg_view(x)), ops.silu_and_mul(-x), "silu")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("how", ["sparse", "nested"])
def test_tensors_without_strides_are_refused(how):
    x = torch.randn(3, 8)
    strange = x.to_sparse() if how == "sparse" else torch.nested.nested_tensor([x[0], x[1, :4]])
    with pytest.raises((ValueError, NotImplementedError), match="strides|baton_kernels::linear"):
        ops.linear(x, strange)
