"""linear with weights packed to int8.

| what | compared with |
| --- | --- |
| products | the reference's bits: on every CPU, any rows and threads, sizes that fill no panel |
| rounding | rows to int8 by hand; ties, extremes, rows that are 0, tiny or not finite |
| groups | by hand; large elements affect only their neighbors |
| accuracy | the error of the product that rounding allows |
| packing | what unpacks; padding; memory of many weights |
| arguments | one table per op, on real and fake tensors |
"""

import pytest
import torch
from judged import on_emulated_tiles
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
from baton_kernels.ops.linear_packed import (
    PANEL_OUTPUTS,
    linear_packed_int8,
    pack_into,
    quantize,
    unpack,
)
from baton_kernels.reference.linear import GROUP, linear_int8, quantize_rows
from baton_kernels.testing import DTYPES, assert_same_bits, nan_in_empty

ONLY_ON = "cpu-"

# 1. The reference.

SIZES = [
    (1, 63, 128), (2, 40, 100), (3, 65, 47), (5, 33, 97), (8, 31, 200), (63, 128, 1),
    (17, 600, 49), (33, 64, 95), (128, 1000, 63), (100, 20, 48), (2, 1, 1000), (1, 1000, 40),
    (1, 4100, 100), (19, 4098, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_has_the_bits_of_the_reference(ops, dtype, bias, sizes):
    arguments = problem(*sizes, bias=bias, dtype=dtype)
    expected = linear_int8(**arguments)
    with nan_in_empty():
        actual = project(ops, arguments, torch.int8)
    assert_same_bits(actual, expected)
    assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 64, 8), (3, 64, 0), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_to_do(ops, bias, sizes, dtype):
    arguments = problem(*sizes, bias=bias, dtype=dtype)
    assert_same_bits(project(ops, arguments, torch.int8), linear_int8(**arguments))


def test_sums_of_the_largest_products(ops):
    """More products of 127 times 127 than 31 bits hold; the last two rows are their negatives."""
    wide = 2**18
    x = torch.ones(4, wide)
    x[2:] = -1.0
    weight = torch.ones(50, wide)
    y = project(ops, {"x": x, "weight": weight}, torch.int8)
    assert_same_bits(y, linear_int8(x, weight))
    # There is one addition per group, each rounded.
    assert y[0, 0].item() == pytest.approx(wide, rel=wide / GROUP * 2**-24)
    assert (y[2:] == -y[0, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_rounding(ops, dtype):
    """Both operands of a product have a uniform error of a 127th of the largest element nearby: for
    x among 64 elements of a row, for the weight in a row."""
    arguments = problem(16, 1000, 96, dtype=dtype)
    exact = arguments["x"].double() @ arguments["weight"].double().T
    error = project(ops, arguments, torch.int8).double() - exact
    relative = error.square().mean().sqrt() / exact.square().mean().sqrt()

    def noise(parts, rows):
        squares = [(part.abs().amax(1) / 127).square() * part.shape[1] / 12 for part in parts]
        return (sum(squares) / rows.square().sum(1)).mean()

    x, weight = arguments["x"].double(), arguments["weight"].double()
    expected = (noise(x.split(GROUP, 1), x) + noise([weight], weight)).sqrt()
    assert relative == pytest.approx(expected.item(), rel=0.1)


# 2. Rounding.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 64, 129])
def test_rows_are_rounded_as_in_the_reference(ops, dtype, size):
    rows = problem(1, size, 50, dtype=dtype)["weight"]
    rows[3] = 0.0
    rows[4, 0] = torch.inf
    rows[5, size - 1] = torch.nan
    rows[6] = -torch.inf
    rows[7] *= 1e4
    packed = pack_linear(rows, dtype=torch.int8)
    expected, scales = quantize_rows(rows)
    assert_same_bits(packed.scales, scales)
    assert_same_bits(unpack(packed.panels, 50, size), expected)
    assert expected.abs().max() == 127 and scales[4:7].isnan().all() and scales[3] == 0


def test_rounding_by_hand():
    """The scale is 1 / 127 * 127, so elements are stored unchanged. Ties go to even."""
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    rounded, scales = quantize(x)
    assert rounded.tolist() == [[127, 0, 2, -2, -126], [0] * 5]
    assert scales.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 3.7e-37, 3.8e-37, 1e-30, 3e38])
def test_extremes(ops, largest):
    """Rows below the smallest scale count as 0; none becomes infinite or NaN."""
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * largest
    weight = torch.eye(4)
    y = project(ops, {"x": x, "weight": weight}, torch.int8)
    assert_same_bits(y, linear_int8(x, weight))
    if largest > 3.75e-37:
        torch.testing.assert_close(y, x, rtol=0, atol=largest / 127)
    else:
        assert (y == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_large_elements_cost_only_their_neighbors(ops, dtype, rows):
    """Elements a thousand times as large as the others, in the last group, which is not whole. What
    the rest of the row adds is as accurate as without them."""
    arguments = problem(rows, 200, 50, dtype=dtype)
    arguments["weight"][:, 192:] = 0
    expected = project(ops, arguments, torch.int8)
    arguments["x"][:, 195] = 1000.0
    assert_same_bits(project(ops, arguments, torch.int8), expected)


@pytest.mark.parametrize("size", [GROUP - 1, GROUP, GROUP + 1, 3 * GROUP])
def test_groups_by_hand(ops, size):
    """Elements are 127 times a power of two in each group, so nothing is rounded."""
    x = 127.0 * torch.tensor([2.0 ** (k // GROUP * 4 - 4) for k in range(size)])[None]
    weight = torch.full((2, size), 127.0)
    weight[1, ::2] = -127.0
    y = project(ops, {"x": x, "weight": weight}, torch.int8)
    assert_same_bits(y, (x.double() @ weight.double().T).float())


# 3. Poison, and bits.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("rows", "column"), [(3, 66), (7, 0), (40, 66)])
def test_poison_stays_in_its_row(ops, dtype, rows, column, poison):
    arguments = problem(rows, 67, 35, bias=True, dtype=dtype)
    check_poison_in_a_row(ops, arguments, torch.int8, lambda x: x[2, column].fill_(poison))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_stays_in_its_output(ops, dtype, poison):
    arguments = problem(5, 67, 130, dtype=dtype)
    check_poison_in_an_output(ops, arguments, torch.int8, lambda row: row[1].fill_(poison))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 67, 35), (5, 64, 3), (17, 95, 32), (100, 40, 50)], ids=str)
def test_nothing_is_loaded_from_behind_the_arguments(ops, sizes, dtype):
    check_before_a_hole(ops, problem(*sizes, bias=True, dtype=dtype), torch.int8)


@pytest.mark.full(where=on_emulated_tiles(lambda case: case["sizes"] == (2100, 250)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(576, 192), (1000, 35), (2100, 250)], ids=str)
def test_bits_for_any_number_of_rows(ops, dtype, sizes):
    check_any_number_of_rows(ops, problem(130, *sizes, bias=True, dtype=dtype), torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_with_many_threads(ops, dtype):
    check_many_threads(ops, problem(40, 700, 100, dtype=dtype), torch.int8)


def test_panels_with_the_lowest_byte(ops):
    """No row is rounded to -128, but a caller's panels may contain it."""
    panels = torch.full((1, 16, PANEL_OUTPUTS, 4), -128, dtype=torch.int8)
    packed = baton_kernels.PackedWeight(panels, 48, 64, torch.ones(48))
    x = torch.full((3, 64), -127.0)
    assert (ops.linear(x, packed) == 127 * 128 * 64).all()


# 4. Packing.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (48, 4), (49, 3), (100, 129), (97, 64)], ids=str)
def test_unpacks_what_was_rounded(dtype, sizes):
    weight = problem(1, sizes[1], sizes[0], dtype=dtype)["weight"]
    before = weight.clone()
    rounded, scales = quantize_rows(weight)
    expected = rounded * scales[:, None]
    packed = pack_linear(weight, dtype=torch.int8)
    assert_same_bits(weight.contiguous(), before.contiguous())
    assert_same_bits(packed.unpack(), expected)
    outputs = torch.tensor([sizes[0] - 1, 0, sizes[0] // 2, 0])
    for dtype_of_index in (torch.int32, torch.int64):
        assert_same_bits(packed.rows(outputs.to(dtype_of_index)), expected[outputs])
    assert packed.rows(outputs[:0]).shape == (0, sizes[1])


def test_padding_is_zero():
    weight = torch.ones(50, 6, dtype=torch.int8)
    with nan_in_empty():
        panels = torch.empty(2, 2, PANEL_OUTPUTS, 4, dtype=torch.int8)
        pack_into(weight, panels)
    assert panels.sum() == 300
    assert (panels[:, 1, :, 2:] == 0).all() and (panels[1, :, 2:] == 0).all()


def test_panels_next_to_the_weight():
    """Memory that ends where the panels begin is separate; one byte more overlaps."""
    memory = torch.ones(8 * 4 + 2 * PANEL_OUTPUTS * 4, dtype=torch.int8)
    weight = memory[:32].view(4, 8)
    panels = memory[32:].view(1, 2, PANEL_OUTPUTS, 4)
    pack_into(weight, panels)
    assert panels.sum() == 32
    with pytest.raises(ValueError, match="panels must be in memory apart from weight's"):
        pack_into(memory[1:33].view(4, 8), panels)


def test_panels_by_hand():
    """Two outputs of five elements: four elements of one output in a row, outputs side by side."""
    weight = torch.tensor([[1, 2, 3, 4, 127], [-127, 6, 7, 8, 9]]).bfloat16()
    packed = pack_linear(weight, dtype=torch.int8)
    assert packed.panels.dtype == torch.int8 and packed.panels.shape == (1, 2, 48, 4)
    assert packed.panels[0, 0, :3].tolist() == [[1, 2, 3, 4], [-127, 6, 7, 8], [0] * 4]
    assert packed.panels[0, 1, :3].tolist() == [[127, 0, 0, 0], [9, 0, 0, 0], [0] * 4]
    assert packed.scales.tolist() == [1.0, 1.0]


def test_panels_in_one_memory():
    weights = [torch.randn(n, 400) for n in (70, 48, 1)]
    sizes = [panel_bytes(weight, dtype=torch.int8) for weight in weights]
    # A fourth of float32's, and half of bfloat16's.
    assert 3 * sizes[0] < panel_bytes(weights[0])
    memory = PanelMemory(sum(sizes))
    packed = [pack_linear(weight, dtype=torch.int8, memory=memory) for weight in weights]
    with pytest.raises(ValueError, match="pack_linear: memory must have "):
        pack_linear(weights[0], dtype=torch.int8, memory=memory)
    for weight, one in zip(weights, packed, strict=True):
        assert_same_bits(one.unpack(), pack_linear(weight, dtype=torch.int8).unpack())


# 5. Bad arguments.


def linear_arguments():
    return {
        "x": torch.ones(3, 8),
        "panels": torch.ones(1, 2, PANEL_OUTPUTS, 4, dtype=torch.int8),
        "scales": torch.ones(5),
        "out_features": 5,
        "bias": torch.ones(5),
    }


def quantize_arguments():
    return {"weight": torch.ones(4, 8)}


OPS = {
    "linear_packed": (linear_packed_int8, "int8", linear_arguments),
    "quantize_linear": (quantize, "default", quantize_arguments),
}
# op, name of the argument in the message, error, changes
BAD = {
    "x of one dimension": ("linear_packed", "x", ValueError, {"x": torch.ones(8)}),
    "x of doubles": ("linear_packed", "x", TypeError, {"x": torch.ones(3, 8).double()}),
    "x of int8": ("linear_packed", "x", TypeError, {"x": torch.ones(3, 8).char()}),
    "x of other size": ("linear_packed", "panels", ValueError, {"x": torch.ones(3, 9)}),
    "x in columns": ("linear_packed", "x", ValueError, {"x": torch.ones(8, 3).t()}),
    "panels of floats": (
        "linear_packed", "panels", TypeError, {"panels": torch.ones(1, 2, PANEL_OUTPUTS, 4)}
    ),
    "panels of uint8": (
        "linear_packed", "panels", TypeError, {"panels": torch.ones(1, 2, PANEL_OUTPUTS, 4).byte()}
    ),
    "panels without fours": (
        "linear_packed", "panels", ValueError, {"panels": torch.ones(1, 8, PANEL_OUTPUTS).char()}
    ),
    "more outputs than panels": (
        "linear_packed", "panels", ValueError, {"out_features": 49, "scales": torch.ones(49)}
    ),
    "negative outputs": ("linear_packed", "out_features", ValueError, {"out_features": -1}),
    "scales of other size": ("linear_packed", "scales", ValueError, {"scales": torch.ones(48)}),
    "scales of halves": ("linear_packed", "scales", TypeError, {"scales": torch.ones(5).half()}),
    "scales with gaps": ("linear_packed", "scales", ValueError, {"scales": torch.ones(10)[::2]}),
    "bias of other size": ("linear_packed", "bias", ValueError, {"bias": torch.ones(48)}),
    "bias of other dtype": ("linear_packed", "bias", TypeError, {"bias": torch.ones(5).half()}),
    "weight of one dimension": ("quantize_linear", "weight", ValueError, {"weight": torch.ones(8)}),
    "weight of int8": ("quantize_linear", "weight", TypeError, {"weight": torch.ones(4, 8).char()}),
    "weight in columns": (
        "quantize_linear", "weight", ValueError, {"weight": torch.ones(8, 4).t()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("route", ["python", "torch.ops", "fake"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, route):
    check_refusal(BAD[name], OPS, route)


@pytest.mark.parametrize(
    ("weight", "dtype", "error", "match"),
    [
        (torch.ones(3), torch.int8, ValueError, "weight must be a 2-D tensor"),
        (torch.ones(3, 4).int(), torch.int8, TypeError, "weight must be float32, float16 or"),
        (torch.ones(4, 3).t(), torch.int8, ValueError, "weight must be contiguous in its last"),
        (torch.ones(4, 3), torch.bfloat16, TypeError, "dtype must be float32 as weight, or int8"),
        (torch.ones(4, 3), "int8", TypeError, "dtype must be float32 as weight, or int8, got 'int"),
        (
            torch.empty(6, 4, device="meta"), torch.int8, NotImplementedError,
            "weight must be on the cpu for int8, got meta",
        ),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_packed(weight, dtype, error, match):
    with pytest.raises(error, match=f"pack_linear: {match}"):
        pack_linear(weight, dtype=dtype)


def test_no_gradients():
    packed = pack_linear(torch.ones(4, 8), dtype=torch.int8)
    with pytest.raises(NotImplementedError, match="linear_packed: tensors must not require grad"):
        baton_kernels.linear(torch.ones(3, 8, requires_grad=True), packed)


# 6. torch.compile.


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op, dtype):
    _, overload, make = OPS[op]
    arguments = {
        name: value.to(dtype) if name in ("x", "bias", "weight") else value
        for name, value in make().items()
    }
    native = getattr(getattr(torch.ops.baton_kernels, op), overload)
    torch.library.opcheck(native, tuple(arguments.values()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("bias", [False, True])
def test_compile(bias):
    compiled = torch.compile(baton_kernels.linear, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        arguments = problem(rows, 64, 50, bias=bias, dtype=torch.bfloat16)
        arguments["weight"] = pack_linear(arguments["weight"], dtype=torch.int8)
        with torch.inference_mode():
            assert_same_bits(compiled(**arguments), baton_kernels.linear(**arguments))


# 7. By hand.


def test_by_hand(ops):
    """Every row's largest element is 127 times a power of two: nothing is rounded."""
    x = torch.tensor([[127.0, 2.0, 3.0], [0.0, -63.5, 0.5]])
    weight = torch.tensor([[127.0, 1.0, 1.0], [2.0, 0.0, -254.0]])
    bias = torch.tensor([10.0, 20.0])
    for dtype in (torch.float32, torch.float16):
        packed = pack_linear(weight.to(dtype), dtype=torch.int8)
        y = ops.linear(x.to(dtype), packed, bias.to(dtype))
        first = [127.0 * 127 + 5 + 10, 254.0 - 762 + 20]
        assert y.tolist() == [torch.tensor(first).to(dtype).tolist(), [-53.0, -107.0]]
