"""Statements about all values of the data, proved on nvcc's PTX with values as terms."""

import dataclasses

import numpy as np
import pytest
import torch

from emulation.prove.attention import leaves
from emulation.prove.claims import Prover
from emulation.prove.defects import DEFECTS, examine
from emulation.prove.everything import is_expected, prove_quick, prove_triton, triton_grids
from emulation.ptx.machine import compile_ptx
from emulation.ptx.symbolic import SymbolicMachine
from emulation.ptx.symbolic_memory import SymbolicError
from emulation.ptx.terms import Terms


# `make test-cuda-build` runs it: what a defect looks like is tested here, and the rules.
@pytest.mark.full
@pytest.mark.parametrize("architecture", [80, 75])
def test_quick_proofs(architecture):
    """The output of `python -m emulation.prove --quick`: only what must be refuted is refuted."""
    prover = prove_quick(Prover(architecture))
    unexpected = [claim for claim in prover.claims if not is_expected(claim)]
    assert not unexpected, unexpected


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_refuted(defect):
    claims = {claim.statement: claim for claim in examine(defect)}
    refuted = {statement for statement, claim in claims.items() if claim.evidence}
    assert refuted >= set(DEFECTS[defect])
    assert bool(refuted) == bool(DEFECTS[defect])


def test_triton_decode():
    """The same statements about Triton's code for a row of one token, in slots and in pages."""
    prover = Prover(80)
    for grid in triton_grids():
        if "float16" in grid.kernel.split(", "):
            prove_triton(prover, dataclasses.replace(grid, lengths=(18,), options=({},)))
    assert len(prover.claims) == 9
    assert all(claim.checks and not claim.evidence for claim in prover.claims), prover.claims


# The machine, on kernels of a few lines.


def run(tmp_path, body: str) -> tuple[Prover, list[str], SymbolicMachine]:
    """`f(float* x)` with this body on 32 leaves; returns what x holds afterwards."""
    source = tmp_path / "kernel.cu"
    source.write_text(
        f"extern __shared__ float shared[]; __global__ void f_kernel(float* x) {{ {body} }}"
    )
    prover = Prover(80)
    machine = SymbolicMachine(compile_ptx(source, 80), "f_kernel", prover.terms)
    machine.shadow = prover.ops.shadow
    x = torch.zeros(32)
    leaves(prover.ops, x, "x", lambda i: (("x", i), i))
    pointer = np.array(x.data_ptr(), np.uint64).tobytes()
    machine.launch((1, 1, 1), (32, 1, 1), [pointer], [x], 256)
    halves = prover.ops.terms_of(x)
    whole = prover.terms.apply("pair", halves[:, 0], halves[:, 1])
    return prover, [prover.terms.text(int(term), 4) for term in whole], machine


def test_both_ways_of_a_branch(tmp_path):
    """Each branch stores something else; memory that only one of them writes is joined too."""
    _, texts, machine = run(tmp_path, """
        const float y = x[threadIdx.x];
        if (y > 2) { x[threadIdx.x] = sqrtf(y); shared[threadIdx.x] = 1; }
        else if (threadIdx.x < 5) x[threadIdx.x] = y + 3;""")  # fmt: skip
    assert machine.forks
    assert texts[7].startswith("pair(ite(setp.")
    assert "sqrt.rn.f32" in texts[7] and "add.f32" not in texts[7]
    assert "sqrt.rn.f32" in texts[3] and "add.f32" in texts[3]


def test_what_data_may_not_decide(tmp_path):
    with pytest.raises(SymbolicError, match="address depends on data"):
        run(tmp_path, "x[static_cast<int>(__float_as_int(x[threadIdx.x])) & 31] = 1;")
    with pytest.raises(SymbolicError, match="loop's end depends on data"):
        run(tmp_path, """
            float y = x[threadIdx.x];
            while (y > 1) y = sqrtf(y);
            x[threadIdx.x] = y;""")  # fmt: skip


def test_rules_hold_for_all_values():
    """Rules that drop something: checked with the numbers that tell right from wrong."""
    terms = Terms()
    x, y = (terms.leaf((name,), name) for name in "xy")
    bottom, low = terms.constant(0xFF800000, 32), terms.constant(0xC0000000, 32)
    zero, one = terms.constant(0, 32), terms.constant(0x3F800000, 32)
    # NaN gives way to -inf: max(x, -inf) is not x.
    assert terms.one("max.f32", x, bottom) != x
    top = terms.one("max.f32", x, low)
    assert terms.one("max.f32", terms.one("max.f32", bottom, low), x) == top
    # A finite member makes a maximum a number above -inf; without one it may be NaN or -inf.
    assert terms.one("sub.f32", bottom, top) == bottom
    assert terms.one("sub.f32", bottom, x) != bottom
    # x + 0 is not x when x is -0.
    assert terms.one("add.f32", x, zero) != x
    power = terms.one("ex2.approx.ftz.f32", x)
    assert terms.one("add.f32", power, zero) == power
    # 0 x is not 0 when x is infinite or NaN.
    assert terms.one("mul.f32", x, zero) != zero
    # Scaling by a factor that is not one is scaling; a test of another factor proves nothing.
    total, tested = terms.one("add.f32", x, y), terms.one("setp.neu.f32", y, one)
    scaled = terms.one("mul.f32", total, y)
    assert terms.one("ite", tested, scaled, total) == scaled
    assert terms.one("ite", terms.one("setp.neu.f32", x, one), scaled, total) != scaled
    assert terms.one("ite", tested, terms.one("mul.f32", x, y), x) != terms.one("mul.f32", x, y)
    equal, unequal, ordered = (terms.one(f"setp.{name}.f32", x, y) for name in ("eq", "neu", "ne"))
    assert terms.one("ite", equal, x, one) == terms.one("ite", unequal, one, x)
    assert terms.one("ite", equal, x, one) != terms.one("ite", ordered, one, x)
    # 0 2^(c - m) is 0 where 2^(c - m) is a number, which c > m does not make it.
    for c, known in ((low, True), (one, False)):
        factor = terms.one("ex2.approx.ftz.f32", terms.one("sub.f32", c, top))
        assert (terms.one("mul.f32", zero, factor) == zero) == known
        added = terms.one("fma.rn.f32", zero, factor, x), terms.one("fma.rn.f32", zero, zero, x)
        assert (added[0] == added[1]) == known and x not in added


def test_rules_of_joined_sums():
    """A sum that is joined with nothing, once or twice, and a product with nothing."""
    terms = Terms()
    x, m, other = (terms.leaf((name,), name) for name in ("x", "m", "other"))
    zero, bottom = terms.constant(0, 32), terms.constant(0xFF800000, 32)

    def weight(score, top):
        power = terms.one("ex2.approx.f32", terms.one("sub.f32", score, top))
        return terms.one("ite", terms.one("setp.eq.f32", score, bottom), zero, power)

    def joined(y, f):
        return terms.one("fma.rn.f32", zero, zero, terms.one("mul.rn.f32", y, f))

    # 2^(m - m) is 1, or NaN as all that is multiplied with it; another power is neither.
    for f, known in ((weight(m, m), True), (weight(m, other), False)):
        assert (joined(joined(x, f), f) == joined(x, f)) == known
        assert (terms.one("fma.rn.f32", joined(x, f), f, zero) == joined(x, f)) == known
        assert (terms.one("fma.rn.f32", x, f, zero) == joined(x, f)) == known
    # x is not x f + 0 where x is -0 or f is NaN.
    assert joined(x, weight(m, m)) != x
    assert joined(joined(x, weight(m, m)), weight(other, other)) != joined(x, weight(m, m))
    # A sum of products of bfloat16 may lose one of zeros, up to the sign of a zero; no other may.
    half = terms.leaf(("half",), "half")
    widened = terms.one("pair", terms.constant(0, 16), half)
    product = terms.one("fma.rn.f32", widened, widened, x)
    assert terms.one("fma.rn.f32", zero, zero, x) != x and not terms.drops_zeros
    assert terms.one("fma.rn.f32", zero, zero, product) == product and terms.drops_zeros
    nothing = terms.group("vector", [terms.constant(0, 16)] * 16)
    some = terms.group("vector", [terms.constant(0, 16)] * 15 + [x])
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    assert terms.one(mma, nothing, nothing, zero) == zero
    # -0 + 0 is 0.
    assert terms.one(mma, nothing, nothing, x) != x
    assert zero not in (terms.one(mma, nothing, some, zero), terms.one(mma, some, nothing, zero))


def test_choices_that_others_imply():
    terms = Terms()
    p, q, r, x, y, base = (terms.leaf((name,), name) for name in ("p", "q", "r", "x", "y", "base"))
    above = terms.one("ite", p, x, terms.one("ite", q, y, base))
    assert terms.one("ite", terms.any([p, q, r]), above, base) == above
    assert terms.one("ite", terms.any([p, r]), above, base) != above
    assert terms.one("ite", terms.any([p, q, r]), above, x) != above


def test_what_is_asked_of_halves():
    """Code for "finite, or 0" in two spellings; a carry between the halves belongs to neither."""
    terms = Terms()
    x, y = (terms.leaf((name,), name) for name in "xy")
    register = terms.one("pair", x, y)

    def number(bits):
        return terms.constant(bits, 32)

    found = terms.one("and.b32", register, number(0x7FFF7FFF))
    found = terms.one(
        "and.b32", terms.one("add.s32", found, number(0x00800080)), number(0x80008000)
    )
    ones = terms.one("mul.lo.s32", terms.one("shr.u32", found, number(15)), number(0xFFFF))
    kept = terms.one("and.b32", register, terms.one("not.b32", ones))
    halves = [terms.halves.finite_or_zero(half, "bf16") for half in (x, y)]
    assert kept == terms.one("pair", *halves)
    tests = [terms.halves.not_finite(half, "bf16") for half in (x, y)]
    assert terms.one("setp.ne.s32", found, number(0)) == terms.any(tests)
    assert terms.one("setp.lt.s32", found, number(0)) == tests[1]
    assert terms.value(terms.halves.not_finite(halves[0], "bf16")) == (0, 1)
    assert terms.halves.not_finite(halves[0], "f16") != terms.constant(0, 1)
    # The same question with bits that cross from one half to the other, and are then left out.
    sums = terms.one(
        "add.s32", terms.one("and.b32", register, number(0x7FFF7FFF)), number(0x800080)
    )
    sign = terms.one("and.b32", terms.one("shr.u32", sums, number(15)), number(1))
    assert terms.one("setp.eq.b32", sign, number(1)) == tests[0]
    assert terms.one("setp.eq.b32", sign, number(0)) == terms.one("not.pred", tests[0])
    assert terms.one("setp.ne.u32", found, number(0)) == terms.any(tests)
    joined = terms.one("or.b32", terms.one("or.b32", found, register), number(0x80))
    assert terms.one("and.b32", joined, number(0x80)) == number(0x80)
    crossing = terms.one("add.s32", register, number(1))
    assert terms.nodes[crossing][0] == "add.s32"
    # Only finite elements vanish next to a weight of 0.
    zero = terms.constant(0, 16)
    assert terms.without_hidden([zero, x], [halves[0], y], "bf16") == terms.group(
        "vector", [zero, y]
    )
    assert terms.without_hidden([zero, x], [x, y], "bf16") == terms.group("vector", [x, y])
