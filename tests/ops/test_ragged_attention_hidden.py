"""Hidden keys and values never affect a token; and the results where a softmax is degenerate."""

import math

import pytest
import torch
from judged import judged

from baton_kernels import reference
from baton_kernels.testing import (
    DTYPES,
    assert_accurate,
    assert_same_bits,
    attention_problem,
    int32,
    random_attention_problem,
    random_rows,
)

# Query tokens, length, (num_heads, num_kv_heads), head_dim, options, the poisoned key.
HIDDEN = {
    "prefill": (30, 30, (2, 1), 64, {}, 25),
    "first tile": (100, 100, (4, 2), 64, {}, 70),
    "chunk": (20, 600, (9, 3), 64, {}, 590),
    "few tokens": (4, 530, (4, 2), 64, {}, 528),
    "second segment": (150, 700, (4, 2), 64, {}, 560),
    "head_dim 24": (20, 40, (2, 2), 24, {}, 30),
    "head_dim 128": (20, 140, (8, 2), 128, {}, 129),
    "decode in a window": (1, 77, (2, 1), 64, {"window": 4}, 70),
    "window": (60, 200, (4, 2), 64, {"window": 20}, 150),
    "both ways in a window": (40, 40, (4, 2), 64, {"causal": False, "window": 5}, 20),
}
POISON = [math.nan, math.inf, -math.inf]


def sees_key(tokens, length, key, *, causal=True, window=None):
    """Whether each query token sees the key."""
    position = torch.arange(length - tokens, length)
    sees = torch.ones(tokens, dtype=torch.bool)
    if causal:
        sees &= position >= key
    if window is not None:
        sees &= position - window < key
    return sees


# "chunk" also has its poison in a second segment.
@pytest.mark.full(where=judged(lambda name: name == "second segment"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_keys_are_not_read(ops, request, every_case, name, what, dtype):
    """Tokens that see the poison get the reference's result, the others the bits without poison."""
    tokens, length, (num_heads, num_kv_heads), head_dim, options, key = HIDDEN[name]
    (row,) = random_rows(
        [tokens], [length], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
    clean = ops.ragged_attention(*attention_problem([row]).args, **options, return_lse=True)
    sees = sees_key(tokens, length, key, **options)
    assert not sees.all()
    poisons = POISON
    if request.node.callspec.params["ops"].name == "cuda-judged" and not every_case:
        # The choice does not affect memory accesses; the bits are those of cuda-emulated.
        poisons = {"key": [math.nan], "value": [math.inf]}[what]
    for poison in poisons:
        getattr(row, what)[key, 0, 3] = poison
        problem = attention_problem([row])
        actual = ops.ragged_attention(*problem.args, **options, return_lse=True)
        for got, want in zip(actual, clean, strict=True):
            assert_same_bits(got[~sees], want[~sees], f"{poison} in the {what} of a hidden key")
        expected, _ = reference.ragged_attention(*problem.args, **options, return_lse=True)
        if what == "value" or math.isnan(poison):
            assert_same_kind(actual[0][sees], expected[sees])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "length", "options"),
    [
        (6, 40, {}),
        (30, 50, {}),
        (6, 540, {"window": 17}),
        (33, 60, {"window": 5}),
        (20, 20, {"causal": False, "window": 3}),
    ],
)
def test_every_token_takes_in_what_it_sees_of_many(ops, tokens, length, options, dtype):
    """Values that are not finite, another dim of every second key: kinds as in the reference, and
    the bits of the others as without them."""
    (row,) = random_rows([tokens], [length], num_heads=2, num_kv_heads=1, dtype=dtype)
    clean = ops.ragged_attention(*attention_problem([row]).args, **options)
    for key in range(max(length - tokens - 20, 0), length, 2):
        row.value[key, 0, key % 64] = POISON[key // 2 % 3]
    problem = attention_problem([row])
    actual = ops.ragged_attention(*problem.args, **options)
    expected = reference.ragged_attention(*problem.args, **options)
    assert_same_kind(actual, expected)
    is_finite = expected.isfinite()
    assert is_finite.any() and not is_finite.all()
    assert_same_bits(actual[is_finite], clean[is_finite])


def assert_same_kind(actual, expected):
    """NaN, inf and -inf in the same places."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert kind(actual).equal(kind(expected)), kind.__name__


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_seen_reaches_every_token_that_sees_it(ops, dtype):
    problem = random_attention_problem([40, 1], [40, 700], dtype=dtype).with_padding(0.0)
    slot, start = int(problem.slots[0]), int(problem.starts[0])
    problem.value_cache[slot, :, start + 11, 2] = math.nan
    out = ops.ragged_attention(*problem.args)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[11:40, :, 2] = True
    assert out.isnan().equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "length"), [(1, 5), (1, 700), (70, 70), (12, 600)])
def test_scores_that_overflow_are_not_a_token_that_sees_nothing(ops, tokens, length, dtype):
    (row,) = random_rows([tokens], [length], num_heads=2, num_kv_heads=1, dtype=dtype)
    row.query[:], row.key[:] = 1e20, -1e20
    problem = attention_problem([row])
    out, lse = ops.ragged_attention(*problem.args, return_lse=True)
    assert out.isnan().all() and (lse == -math.inf).all()
    # A sink is a finite logit.
    sinks = torch.tensor([1.5, -2.0])
    out, lse = ops.ragged_attention(*problem.args, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    assert_same_bits(lse, sinks.expand(tokens, 2).contiguous())
    # The same with one finite score among them.
    row.key[length - tokens] = 0.0
    out, lse = ops.ragged_attention(*attention_problem([row]).args, return_lse=True)
    assert_same_bits(lse, torch.zeros_like(lse))
    assert_same_bits(out, row.value[length - tokens].expand_as(out).contiguous())
    # A softmax cannot weigh an infinite score.
    row.key[length - tokens] = 1e20
    out, lse = ops.ragged_attention(*attention_problem([row]).args, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alibi_both_ways(ops, dtype):
    problem = random_attention_problem([1, 9, 40], [600, 31, 70], dtype=dtype)
    options = {"causal": False, "alibi_slopes": 2.0 ** -torch.arange(1.0, 5.0)}
    actual = ops.ragged_attention(*problem.args, **options)
    assert_accurate(actual, "ragged_attention", *problem.args, **options)


def test_alibi_counts_distance_without_sign(ops):
    """Query token 0 of 3, causal or not: both neighbors of token 1 are equally far from it."""
    key_cache = torch.zeros(1, 1, 3, 16)
    value_cache = torch.zeros(1, 1, 3, 16)
    value_cache[0, 0, :, 0] = torch.tensor([1.0, 10.0, 100.0])
    shape = int32([0, 3]), int32([0]), int32([0]), int32([3])
    query = torch.ones(3, 1, 16)
    slopes = torch.tensor([math.log(2.0)])
    out = ops.ragged_attention(
        query, key_cache, value_cache, *shape, causal=False, alibi_slopes=slopes
    )
    # Weights 1, 1/2, 1/4; 1/2, 1, 1/2; 1/4, 1/2, 1.
    expected = torch.tensor([(1 + 5 + 25) / 1.75, (0.5 + 10 + 50) / 2, (0.25 + 5 + 100) / 1.75])
    torch.testing.assert_close(out[:, 0, 0], expected)
