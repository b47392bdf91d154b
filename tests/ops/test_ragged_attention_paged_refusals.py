"""Bad block tables are rejected with the documented errors before anything is written."""

import dataclasses

import pytest
import torch
from paged import ABSURD, paged_problem

import baton_kernels
from baton_kernels.testing import Refusal, assert_same_bits, int32, random_attention_problem


def arguments_to_spoil():
    dense = random_attention_problem(
        [2, 1], [3, 5], head_dim=16, num_slots=4, capacity=8, slots=[1, 3], starts=[0, 2]
    )
    pages = paged_problem(dense, 2)
    # Valid: one entry, then four, the first of which holds no column of the row.
    table = pages.block_table.contiguous()[:, :4]
    return pages.arguments | {"block_table": table.contiguous()}


def entry(row, column, value):
    """A table with one entry changed."""

    def change(table):
        table = table.clone()
        table[row, column] = value
        return table

    return change


CACHES = ("key_cache", "value_cache")
BAD = {
    "table int64": Refusal("block_table", TypeError, block_table=torch.Tensor.long),
    "table of floats": Refusal("block_table", TypeError, block_table=torch.Tensor.float),
    "table of one dimension": Refusal("block_table", ValueError, block_table=lambda x: x[0]),
    "table of three dimensions": Refusal("block_table", ValueError, block_table=lambda x: x[None]),
    "a row too few": Refusal("block_table", ValueError, block_table=lambda x: x[:1]),
    "a row too many": Refusal("block_table", ValueError, block_table=lambda x: torch.cat((x, x))),
    "table strided": Refusal(
        "block_table", ValueError, block_table=lambda x: x.repeat_interleave(2, 1)[:, ::2]
    ),
    "table transposed": Refusal(
        "block_table", ValueError, block_table=lambda x: x.t().contiguous().t()
    ),
    "table elsewhere": Refusal("block_table", ValueError, block_table=lambda x: x.to("meta")),
    "pages of no column": Refusal(
        "key_cache", ValueError, **dict.fromkeys(CACHES, lambda x: x[:, :, :0])
    ),
    "starts of other rows": Refusal("starts|lengths|block_table", ValueError, starts=int32([0])),
    "page past the end": Refusal(
        r"block_table\[1\]\[2\]", ValueError, values=True,
        block_table=lambda x: entry(1, 2, 10**6)(x),
    ),
    "page that is the number of pages": Refusal(
        r"block_table\[0\]\[1\]", ValueError, values=True, block_table=entry(0, 1, 8)
    ),
    "page below zero": Refusal(
        r"block_table\[0\]\[0\]", ValueError, values=True, block_table=entry(0, 0, -1)
    ),
    "last page below zero": Refusal(
        r"block_table\[1\]\[3\]", ValueError, values=True, block_table=entry(1, 3, ABSURD[0])
    ),
    "a page too few": Refusal(
        "(starts|lengths).*", ValueError, values=True,
        block_table=lambda x: x[:, :3].contiguous(),
    ),
    "no pages": Refusal(
        "(starts|lengths).*", ValueError, values=True,
        block_table=lambda x: x[:, :0].contiguous(),
    ),
    "length past the table": Refusal(
        "(starts|lengths).*", ValueError, values=True, lengths=int32([3, 7])
    ),
    "length past 2**31": Refusal(
        "(starts|lengths).*", ValueError, values=True, lengths=int32([3, 2**31 - 1])
    ),
    "start below zero": Refusal("starts.*", ValueError, values=True, starts=int32([-1, 2])),
    "max_length too low": Refusal("(max_length|lengths).*", ValueError, values=True, max_length=4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    given = arguments_to_spoil()
    assert given["key_cache"].shape[0] == 8
    baton_kernels.ragged_attention(**given)
    if route == "torch.ops":
        # The schema has these as optional arguments without defaults.
        BAD[name].check("ragged_attention", given | {"slots": None}, route)
        return
    for options in ({}, {"return_lse": True}):
        BAD[name].check("ragged_attention", given | options, route)


def test_a_bad_table_leaves_out_as_it_was():
    given = arguments_to_spoil()
    out = torch.full_like(given["query"], 7.0).contiguous()
    given["block_table"][0, 0] = -1
    with pytest.raises(ValueError, match=r"block_table\[0\]\[0\] must be in \[0, 7\], got -1"):
        baton_kernels.ragged_attention(**given, out=out)
    assert (out == 7.0).all()


def test_tables_written_in_place():
    """The same tensor with other pages, then with a bad one, then with the good ones again."""
    dense = random_attention_problem([1, 1], [90, 40], starts=[0, 0])
    pages, others = paged_problem(dense, 16), paged_problem(dense, 16, seed=1)
    expected = baton_kernels.ragged_attention(*dense.args)
    assert_same_bits(baton_kernels.ragged_attention(**pages.arguments), expected)
    good = pages.block_table.clone()
    pages.block_table.copy_(others.block_table)
    other = dataclasses.replace(pages, key_cache=others.key_cache, value_cache=others.value_cache)
    assert_same_bits(baton_kernels.ragged_attention(**other.arguments), expected)
    pages.block_table[1, 2] = 10**6
    for _ in range(2):
        with pytest.raises(ValueError, match=r"block_table\[1\]\[2\]"):
            baton_kernels.ragged_attention(**pages.arguments)
    pages.block_table.copy_(good)
    assert_same_bits(baton_kernels.ragged_attention(**pages.arguments), expected)
    # The same index values mean something else without a table.
    with pytest.raises(ValueError, match="ragged_attention: (lengths|starts|slots)"):
        baton_kernels.ragged_attention(**pages.arguments | {"block_table": None})
