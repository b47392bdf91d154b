"""AMX: the emulated instructions compared with Intel's manual, and those in the built library.

The kernels are tested by the tests of their ops: with the backend cpu-amx_bf16 where the CPU has
AMX, else with cpu-amx_bf16-emulated.
"""

import ctypes
import re
import subprocess

import pytest
import torch
from bench_package import import_bench

import baton_kernels
from baton_kernels import _library
from baton_kernels.testing import assert_same_bits, available_cpu_isas, cpu_isa
from emulation import amx

HAS_AMX = "amx_bf16" in available_cpu_isas()
modeled = pytest.mark.skipif(
    not amx.has_model(), reason="needs the sources and a CPU with AVX512-BF16"
)
emulated = pytest.mark.skipif(
    not amx.can_be_emulated(),
    reason="needs a library with AMX, and a CPU without it but with AVX512-BF16",
)

# 1. The emulated instructions.


def configure(shapes, palette=1, **changes):
    """ldtilecfg for {tile: (rows, bytes)}; changes set bytes by position (byte_17=3)."""
    config = bytearray(64)
    config[0] = palette
    for tile, (rows, row_bytes) in shapes.items():
        config[16 + 2 * tile] = row_bytes
        config[48 + tile] = rows
    for place, value in changes.items():
        config[int(place.removeprefix("byte_"))] = value
    amx.library().model_configure(bytes(config))


def load(tile, x):
    amx.library().model_load(
        tile, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0) * x.element_size())
    )


def store(tile, x):
    amx.library().model_store(
        tile, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0) * x.element_size())
    )


def flush(x):
    """Denormal numbers become 0 and keep their sign."""
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0.0 * x, x)


def fused(a, b, c):
    """The float32 nearest to a b + c. float64 represents the sum except for its last bit.

    That bit is set where the sum is not exact, so that the second rounding cannot meet a tie.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    inexact = (lost != 0) & (bits % 2 == 0)
    away = (lost > 0) == (total > 0)
    bits = torch.where(inexact, bits + torch.where(away, 1, -1), bits)
    return flush(bits.view(torch.float64).float())


def tdpbf16ps(total, a, b):
    """As in the manual: total[m, n] += the even, then the odd products of a[m] and b[:, n]."""
    a, b = flush(a.float()), flush(b.float())
    sums = []
    for odd in (0, 1):
        chain = torch.zeros(len(a), b.shape[1] // 2)
        for k in range(len(b)):
            row = b[k, odd::2].expand_as(chain)
            chain = fused(a[:, 2 * k + odd, None].expand_as(chain), row, chain)
        sums.append(chain)
    return flush(flush(total) + flush(sums[0] + sums[1]))


def multiply_in_tiles(total, a, b):
    """total += a b in the model's tiles; b holds pairs."""
    (rows, columns), pairs = total.shape, b.shape[0]
    configure({0: (rows, 4 * columns), 4: (rows, 4 * pairs), 6: (pairs, 4 * columns)})
    load(0, total)
    load(4, a)
    load(6, b)
    amx.library().model_multiply(0, 4, 6)
    store(0, total)
    amx.library().model_release()
    amx.check_faults()


@modeled
@pytest.mark.parametrize("spread", [1.0, 40.0, 120.0])
@pytest.mark.parametrize("shape", [(16, 16, 16), (1, 16, 5), (7, 3, 16), (16, 1, 1)], ids=str)
def test_multiplies_as_the_manual_says(shape, spread):
    rows, pairs, columns = shape
    generator = torch.Generator().manual_seed(rows + pairs)

    def numbers(*size):
        # Exponents over a wide range: cancellation, lost bits, denormal inputs and results.
        scale = torch.empty(size).uniform_(-spread, spread / 8, generator=generator)
        return torch.randn(size, generator=generator) * scale.exp2()

    # Slices, so that the row stride differs from the row length.
    a, b = numbers(rows, 2 * pairs + 6).bfloat16(), numbers(pairs, 2 * columns + 2).bfloat16()
    a, b = a[:, 3 : 3 + 2 * pairs], b[:, : 2 * columns]
    total = numbers(rows, columns)
    expected = tdpbf16ps(total, a, b)
    multiply_in_tiles(total, a, b)
    assert_same_bits(total, expected)


@modeled
@pytest.mark.parametrize("shape", [(16, 16, 16), (1, 16, 5), (7, 3, 16)], ids=str)
def test_multiplies_bytes(shape):
    rows, fours, columns = shape
    generator = torch.Generator().manual_seed(rows)

    def numbers(*size):
        return torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)

    a, b = numbers(rows, 4 * fours), numbers(fours, 4 * columns)
    total = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator).int()
    right = b.view(fours, columns, 4).permute(0, 2, 1).reshape(4 * fours, columns)
    # Sums wrap.
    expected = (total.long() + a.long() @ right.long()).int()
    configure({0: (rows, 4 * columns), 4: (rows, 4 * fours), 6: (fours, 4 * columns)})
    for tile, x in ((0, total), (4, a), (6, b)):
        load(tile, x)
    amx.library().model_multiply_bytes(0, 4, 6)
    store(0, total)
    amx.library().model_release()
    amx.check_faults()
    assert total.equal(expected)


@modeled
def test_denormal_numbers_count_as_zero():
    """The products below stay within float32, except for inputs or results that are flushed."""
    a, b = torch.tensor([[2.0**-130, 1.0]]), torch.tensor([[2.0**100, 2.0**-130]])
    total = torch.tensor([[2.0**-140]])
    assert tdpbf16ps(total, a.bfloat16(), b.bfloat16()).item() == 0.0
    multiply_in_tiles(total, a.bfloat16(), b.bfloat16())
    assert total.item() == 0.0


@modeled
def test_zero_and_store():
    configure({2: (3, 8)})
    x = torch.arange(8.0).view(4, 2)
    load(2, x)
    out = torch.full((5, 4), 9.0)
    store(2, out)
    assert out[:3, :2].equal(x[:3])
    assert (out[3:] == 9).all() and (out[:, 2:] == 9).all(), "beyond the tile"
    amx.library().model_zero(2)
    store(2, out)
    assert (out[:3, :2] == 0).all()
    amx.library().model_release()
    amx.check_faults()


FULL = {tile: (16, 64) for tile in range(8)}
FAULTS = {
    "palette 2": lambda: configure(FULL, palette=2),
    "17 rows": lambda: configure({0: (17, 64)}),
    "65 bytes": lambda: configure({0: (16, 65)}),
    "rows of nothing": lambda: configure({0: (16, 0)}),
    "a ninth tile": lambda: configure({8: (16, 64)}),
    "a reserved byte": lambda: configure(FULL, byte_2=1),
    "no configuration": lambda: amx.library().model_zero(0),
    "a tile without one": lambda: (configure({0: (16, 64)}), amx.library().model_zero(1)),
    "one tile twice": lambda: (configure(FULL), amx.library().model_multiply(0, 4, 4)),
    "other lengths": lambda: (
        configure({0: (16, 64), 4: (16, 60), 6: (16, 64)}),
        amx.library().model_multiply(0, 4, 6),
    ),
    "other columns": lambda: (
        configure({0: (16, 60), 4: (16, 64), 6: (16, 64)}),
        amx.library().model_multiply(0, 4, 6),
    ),
    "half a pair": lambda: (
        configure({0: (16, 62), 4: (16, 64), 6: (16, 62)}),
        amx.library().model_multiply(0, 4, 6),
    ),
    "not released": lambda: configure(FULL),
}


@modeled
@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    amx.check_faults()
    FAULTS[name]()
    with pytest.raises(amx.EmulationError):
        amx.check_faults()
    amx.check_faults()


# 2. The instructions of the built library.

TILE_INSTRUCTION = re.compile(r"\b(tdp\w+|tileload\w+|tilestored|tilezero|tilerelease|ldtilecfg)\b")
NEEDED = {"tdpbf16ps", "tileloadd", "tilestored", "tilezero", "tilerelease", "ldtilecfg"}


@pytest.fixture(scope="module")
def tile_instructions():
    """(function, bytes, text) of every AMX instruction in the library that users run."""
    if "amx_bf16" not in baton_kernels.build_info()["cpu"]["isa_compiled"]:
        pytest.skip("needs a library with AMX: x86-64, and a compiler that knows it")
    path = str(_library.cpu)
    command = ["objdump", "--disassemble", "--wide", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, function = [], ""
    for line in done.stdout.splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif TILE_INSTRUCTION.search(line):
            _, code, text = line.split("\t")
            found.append((function, bytes.fromhex(code), text.strip()))
    return found


def test_tile_instructions_stand_in_the_amx_kernels_alone(tile_instructions):
    assert {text.split()[0] for _, _, text in tile_instructions} >= NEEDED
    for function, _, text in tile_instructions:
        assert "8amx_bf16" in function, f"{text} in {function}"


@pytest.mark.parametrize("functions", ["linear|LinearParams", "ragged_attention|AttentionProducts"])
def test_kernels_configure_multiply_and_release(tile_instructions, functions):
    found = {text.split()[0] for name, _, text in tile_instructions if re.search(functions, name)}
    assert found >= NEEDED - {"tilezero"}


def test_encoding_of_products(tile_instructions):
    """sum += a b: sums are tiles 0 to 3, a 4 or 5, b 6 or 7 (csrc/cpu/simd/amx.h, TileScope), and
    those of ragged_attention with few query vectors (csrc/cpu/ragged_attention/tile_amx.h). For
    packed weights (csrc/cpu/linear_packed_amx.h): sums 0 to 5, a 6, b 7.

    VEX.128.F3.0F38.W0 5C /r has the sum in ModRM:reg, a in ModRM:r/m, b in VEX.vvvv (inverted).
    """
    products = [code for _, code, text in tile_instructions if text.startswith("tdpbf16ps")]
    shapes = set()
    for code in products:
        assert len(code) == 5 and code[0] == 0xC4 and code[3] == 0x5C and code[4] >> 6 == 3
        assert code[1] & 0x1F == 2, "opcode map 0F38"
        assert code[2] & 0x87 == 0x02, "W0, L0, F3"
        shapes.add((code[4] >> 3 & 7, code[4] & 7, ~(code[2] >> 3) & 15))
    whole = {(0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)}
    few = {(0, 4, 6), (1, 5, 6), (2, 7, 4), (3, 7, 5)}
    packed = {(total, 6, 7) for total in range(6)}
    assert shapes == whole | few | packed


def test_encoding_of_products_of_bytes(tile_instructions):
    """The instructions for packed weights: sums 0 to 5, a 6, b 7; VEX.128.F2.0F38.W0 5E /r."""
    products = [code for _, code, text in tile_instructions if text.startswith("tdpbssd")]
    shapes = set()
    for code in products:
        assert len(code) == 5 and code[0] == 0xC4 and code[3] == 0x5E and code[4] >> 6 == 3
        assert code[1] & 0x1F == 2 and code[2] & 0x87 == 0x03
        shapes.add((code[4] >> 3 & 7, code[4] & 7, ~(code[2] >> 3) & 15))
    assert shapes == {(total, 6, 7) for total in range(6)}


@modeled
@pytest.mark.skipif(
    not HAS_AMX and not amx.can_be_emulated(), reason="needs AMX, or a CPU that can emulate it"
)
@pytest.mark.parametrize("spread", [0.0, 20.0])
@pytest.mark.parametrize("rows", [3, 16, 40])
def test_linear_has_the_bits_of_the_manual(rows, spread):
    """Also on a CPU that has AMX: then the CPU is compared with the manual."""
    generator = torch.Generator().manual_seed(rows)
    scale = torch.empty(rows, 224).uniform_(-spread, spread, generator=generator).exp2()
    x = (torch.randn(rows, 224, generator=generator) * scale).bfloat16()
    weight = torch.randn(70, 224, generator=generator).bfloat16()
    total = torch.zeros(70, rows)
    for step in range(0, 224, 32):
        # Pairs of neighboring elements, with the pairs of one row next to those of the other.
        pairs = x[:, step : step + 32].reshape(rows, 16, 2).transpose(0, 1).reshape(16, 2 * rows)
        total = tdpbf16ps(total, weight[:, step : step + 32], pairs)
    with cpu_isa("amx_bf16") if HAS_AMX else amx.entered():
        actual = baton_kernels.linear(x, weight)
    amx.check_faults()
    assert_same_bits(actual, total.T.bfloat16().contiguous())


# 3. The choice.


def test_amx_is_used_where_it_is_found():
    cpu = baton_kernels.build_info()["cpu"]
    usable = "amx_bf16" in cpu["isa_compiled"] and "amx_bf16" in cpu["isa_found"]
    assert (cpu["isa_used"] == "amx_bf16") == usable
    assert ("amx_bf16" in available_cpu_isas()) == usable


def test_what_the_cpu_lacks_is_not_chosen():
    cpu = baton_kernels.build_info()["cpu"]
    for name in set(cpu["isa_compiled"]) - set(cpu["isa_found"]):
        with pytest.raises(ValueError, match="compiled and found"), cpu_isa(name):
            pass
    assert baton_kernels.build_info()["cpu"]["isa_used"] == cpu["isa_used"]


# 4. How many instructions the kernels take (python -m bench.amx).


@emulated
@pytest.mark.parametrize("rows", [96, 300])
def test_linear_multiplies_nothing_twice(rows):
    """Whole tiles: all multiplications are useful except for rows that fill up the last tile."""
    counts = import_bench("amx").count_linear(rows, 96, 64)
    tiles = -(-rows // 16) * 4
    expected = {"multiplies": 3 * tiles, "stores": tiles, "zeros": tiles}
    expected |= {"configures": 1, "releases": 1}
    assert {name: counts.instructions[name] for name in expected} == expected
    # Blocks of 2 x 2 tiles load four for four products; an odd tile at the end three for two.
    assert counts.per_product("loads") <= 1 + (0.5 * (tiles // 4 % 2) * 4 / tiles)


@emulated
def test_decode_of_a_large_group_fills_the_tiles():
    counts = import_bench("amx").count_attention(1, 1024, (32, 1), 128)
    assert counts.useful == 1.0
    assert counts.instructions["configures"] == counts.instructions["releases"] == 1


@emulated
def test_prefill_skips_what_no_query_sees():
    counts = import_bench("amx").count_attention(256, 256, (4, 1), 64)
    # For each tile of 16 tokens: scores of 16 keys at a time, products with values of 32.
    keys = [16 * (tile + 1) + 32 * (tile // 2 + 1) for tile in range(16)]
    assert counts.useful == pytest.approx(2 * sum(range(257)) / (16 * sum(keys)))
