"""linear with packed weights.

| what | compared with |
| --- | --- |
| products | the reference, as accurate as plain torch; every dtype, sizes that fill no panel |
| bits | 1 to 130 rows at once, any number of threads, per instruction set |
| packing | every element is restored; rows by index; no memory of the weight is kept |
| arguments | one table per op, on real and fake tensors |
"""

import pytest
import torch
from packed_linear import (
    check_any_number_of_rows,
    check_before_a_hole,
    check_many_threads,
    check_poison_in_a_row,
    check_poison_in_an_output,
    check_refusal,
    problem,
    project,
)

import baton_kernels
from baton_kernels import PanelMemory, pack_linear, panel_bytes
from baton_kernels.ops.linear_packed import PANEL_OUTPUTS, linear_packed, pack_into, unpack
from baton_kernels.testing import (
    DTYPES,
    assert_accurate,
    assert_same_bits,
    nan_in_empty,
    storage,
    twin,
)

ONLY_ON = "cpu-"


def check(ops, arguments):
    before = {name: twin(x) for name, x in arguments.items()}
    with nan_in_empty():
        actual = project(ops, arguments)
    assert_accurate(actual, "linear", *(x.contiguous() for x in before.values()))
    for name, x in arguments.items():
        assert_same_bits(storage(x), storage(before[name]), name)
    assert actual.is_contiguous()


# 1. The reference.

SIZES = [
    (1, 63, 128), (2, 40, 100), (3, 65, 47), (5, 33, 97), (8, 31, 200), (63, 128, 1),
    (17, 600, 49), (33, 64, 95), (128, 1000, 63), (100, 20, 48), (2, 1, 1000), (1, 1000, 40),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(ops, dtype, bias, sizes):
    check(ops, problem(*sizes, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_long_sums(ops, dtype, rows):
    check(ops, problem(rows, 4096, 64, dtype=dtype))


# 2. Edges.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(0, 64, 8), (3, 64, 0), (3, 0, 8)], ids=str)
def test_nothing_to_do(ops, bias, sizes, dtype):
    check(ops, problem(*sizes, bias=bias, dtype=dtype))


# 3. Poison, and bits.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 7, 40])
def test_poison_stays_in_its_row(ops, dtype, rows):
    arguments = problem(rows, 67, 35, dtype=dtype)
    check_poison_in_a_row(ops, arguments, None, lambda x: x[2].fill_(torch.nan))


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_output(ops, dtype):
    """Including half of the last pair."""
    arguments = problem(5, 67, 130, dtype=dtype)
    check_poison_in_an_output(ops, arguments, None, lambda row: row.fill_(torch.nan))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 67, 35), (5, 64, 3), (17, 95, 32), (100, 40, 50)], ids=str)
def test_nothing_is_loaded_from_behind_the_arguments(ops, sizes, dtype):
    check_before_a_hole(ops, problem(*sizes, bias=True, dtype=dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(576, 192), (1000, 35), (33, 250)], ids=str)
def test_bits_for_any_number_of_rows(ops, dtype, sizes):
    check_any_number_of_rows(ops, problem(130, *sizes, bias=True, dtype=dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_with_many_threads(ops, dtype):
    check_many_threads(ops, problem(40, 700, 100, dtype=dtype), None)


# 4. Packing.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (48, 2), (49, 3), (100, 129), (97, 64)], ids=str)
def test_unpacks_the_same_bits(ops, dtype, sizes):
    weight = problem(1, sizes[1], sizes[0], dtype=dtype)["weight"]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    # Every bit pattern, including NaN with a payload.
    words = torch.randint(-(2**15), 2**15, sizes, generator=torch.Generator().manual_seed(1))
    weight.view(bits).copy_(words if dtype != torch.float32 else words * 65521)
    expected = weight.clone()
    packed = pack_linear(weight)
    weight.zero_()
    assert_same_bits(packed.unpack(), expected)
    outputs = torch.tensor([sizes[0] - 1, 0, sizes[0] // 2, 0])
    for dtype_of_index in (torch.int32, torch.int64):
        assert_same_bits(packed.rows(outputs.to(dtype_of_index)), expected[outputs])
    assert packed.rows(outputs[:0]).shape == (0, sizes[1])


def test_padding_is_zero():
    weight = torch.ones(50, 3, dtype=torch.bfloat16)
    with nan_in_empty():
        panels = torch.empty(2, 2, PANEL_OUTPUTS, 2, dtype=torch.bfloat16)
        pack_into(weight, panels)
    assert panels.sum() == 150
    assert (panels[:, 1, :, 1] == 0).all() and (panels[1, :, 2:] == 0).all()


def test_panels_in_one_memory():
    weights = [torch.randn(n, 40) for n in (70, 48, 1)]
    memory = PanelMemory(sum(map(panel_bytes, weights)))
    packed = [pack_linear(weight, memory=memory) for weight in weights]
    with pytest.raises(ValueError, match="pack_linear: memory must have 1"):
        pack_linear(weights[0], memory=memory)
    memory.release(packed[1].panels)
    for i in (0, 2):
        assert_same_bits(packed[i].unpack(), weights[i])
    # A tensor keeps its memory alive.
    del memory
    assert_same_bits(packed[2].unpack(), weights[2])


def test_other_devices_keep_the_weight():
    weight = torch.empty(6, 4, device="meta")
    packed = pack_linear(weight)
    assert packed.panels is weight and not packed.is_packed
    assert packed.unpack() is weight
    assert baton_kernels.linear(torch.empty(3, 4, device="meta"), packed).shape == (3, 6)


# 5. Bad arguments.


def linear_arguments():
    return {
        "x": torch.ones(3, 8),
        "panels": torch.ones(1, 8, PANEL_OUTPUTS),
        "out_features": 4,
        "bias": torch.ones(4),
    }


def pack_arguments():
    return {"weight": torch.ones(4, 8), "panels": torch.ones(1, 8, PANEL_OUTPUTS)}


def unpack_arguments():
    return {
        "panels": torch.ones(1, 8, PANEL_OUTPUTS),
        "out_features": 4,
        "in_features": 8,
        "outputs": torch.tensor([0, 3], dtype=torch.int32),
    }


OPS = {
    "linear_packed": (linear_packed, "default", linear_arguments),
    "pack_linear": (pack_into, "default", pack_arguments),
    "unpack_linear": (unpack, "default", unpack_arguments),
}
# op, name of the argument in the message, error, changes
BAD = {
    "x of one dimension": ("linear_packed", "x", ValueError, {"x": torch.ones(8)}),
    "x of doubles": ("linear_packed", "x", TypeError, {"x": torch.ones(3, 8).double()}),
    "x of other size": ("linear_packed", "panels", ValueError, {"x": torch.ones(3, 7)}),
    "x in columns": ("linear_packed", "x", ValueError, {"x": torch.ones(8, 3).t()}),
    "panels of other dtype": (
        "linear_packed",
        "panels",
        TypeError,
        {"panels": torch.ones(1, 8, PANEL_OUTPUTS).half()},
    ),
    "panels of bfloat16 without pairs": (
        "linear_packed",
        "panels",
        ValueError,
        {
            "x": torch.ones(3, 8).bfloat16(),
            "panels": torch.ones(1, 8, PANEL_OUTPUTS).bfloat16(),
            "bias": None,
        },
    ),
    "more outputs than panels": ("linear_packed", "panels", ValueError, {"out_features": 49}),
    "fewer outputs than panels": ("linear_packed", "panels", ValueError, {"out_features": 0}),
    "negative outputs": ("linear_packed", "out_features", ValueError, {"out_features": -1}),
    "panels with gaps": (
        "linear_packed",
        "panels",
        ValueError,
        {"panels": torch.ones(1, 8, 2 * PANEL_OUTPUTS)[..., ::2]},
    ),
    "bias of other size": ("linear_packed", "bias", ValueError, {"bias": torch.ones(48)}),
    "bias of other dtype": ("linear_packed", "bias", TypeError, {"bias": torch.ones(4).half()}),
    "weight of one dimension": ("pack_linear", "weight", ValueError, {"weight": torch.ones(8)}),
    "weight of other size": ("pack_linear", "panels", ValueError, {"weight": torch.ones(4, 9)}),
    "weight of int": ("pack_linear", "weight", TypeError, {"weight": torch.ones(4, 8).int()}),
    "more rows": ("unpack_linear", "panels", ValueError, {"out_features": 49}),
    "less in a row": ("unpack_linear", "panels", ValueError, {"in_features": 7}),
    "negative size": ("unpack_linear", "in_features", ValueError, {"in_features": -8}),
    "indices of int64": ("unpack_linear", "outputs", TypeError, {"outputs": torch.tensor([0])}),
    "index beyond": (
        "unpack_linear",
        "outputs",
        ValueError,
        {"outputs": torch.tensor([0, 4], dtype=torch.int32)},
    ),
    "negative index": (
        "unpack_linear",
        "outputs",
        ValueError,
        {"outputs": torch.tensor([-1], dtype=torch.int32)},
    ),
}


# Fake tensors have no values.
BAD_VALUES = ("index beyond", "negative index")


@pytest.mark.parametrize(
    ("name", "route"),
    [(name, route) for name in BAD for route in ("python", "torch.ops")]
    + [(name, "fake") for name in BAD if name not in BAD_VALUES],
)
def test_bad_arguments(name, route):
    check_refusal(BAD[name], OPS, route)


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (torch.ones(3), ValueError, "weight must be a 2-D tensor"),
        (torch.ones(3, 4).int(), TypeError, "weight must be float32, float16 or bfloat16"),
        (torch.ones(4, 3).t(), ValueError, "weight must be contiguous in its last dimension"),
        (None, TypeError, "weight must be a tensor"),
    ],
)
def test_weights_that_cannot_be_packed(weight, error, match):
    with pytest.raises(error, match=f"pack_linear: {match}"):
        pack_linear(weight)


def test_no_gradients():
    packed = pack_linear(torch.ones(4, 8))
    with pytest.raises(NotImplementedError, match="linear_packed: tensors must not require grad"):
        baton_kernels.linear(torch.ones(3, 8, requires_grad=True), packed)


# 6. torch.compile.


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op, dtype):
    def cast(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    arguments = {name: cast(value) for name, value in OPS[op][2]().items()}
    if dtype == torch.bfloat16:
        arguments["panels"] = arguments["panels"].view(1, 4, 2, -1).transpose(2, 3).contiguous()
    torch.library.opcheck(getattr(torch.ops.baton_kernels, op).default, tuple(arguments.values()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("bias", [False, True])
def test_compile(bias):
    compiled = torch.compile(baton_kernels.linear, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        arguments = problem(rows, 64, 50, bias=bias, dtype=torch.bfloat16)
        arguments["weight"] = pack_linear(arguments["weight"])
        with torch.inference_mode():
            assert_same_bits(compiled(**arguments), baton_kernels.linear(**arguments))


# 7. By hand.


def test_by_hand(ops):
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -4.0]])
    bias = torch.tensor([10.0, 20.0])
    for dtype in DTYPES:
        packed = pack_linear(weight.to(dtype))
        assert ops.linear(x.to(dtype), packed).tolist() == [[6.0, -10.0], [-0.5, -2.0]]
        y = ops.linear(x.to(dtype), packed, bias.to(dtype))
        assert y.tolist() == [[16.0, 10.0], [9.5, 18.0]]


def test_panels_by_hand():
    """Two outputs of three elements: elements in order, outputs side by side; in bfloat16 pairs."""
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    panels = pack_linear(weight).panels
    assert panels.shape == (1, 3, 48)
    assert panels[0, :, :3].tolist() == [[1.0, 4.0, 0.0], [2.0, 5.0, 0.0], [3.0, 6.0, 0.0]]
    pairs = pack_linear(weight.bfloat16()).panels
    assert pairs.shape == (1, 2, 48, 2)
    assert pairs[0, 0, :3].tolist() == [[1.0, 2.0], [4.0, 5.0], [0.0, 0.0]]
    assert pairs[0, 1, :3].tolist() == [[3.0, 0.0], [6.0, 0.0], [0.0, 0.0]]
