"""Helpers for testing kernels: ragged problems, poison, accuracy against float64, bit equality.

Needs only torch and this package. Memory that a kernel must not read is poisoned with NaN and
infinities, and tensors are slices of larger ones, so that strides are never trivial.
"""

import contextlib
import ctypes
import dataclasses
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def int32(values: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """An index tensor."""
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """``cu_seqlens`` of queries with these lengths."""
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)], device)


def available_cpu_isas() -> tuple[str, ...]:
    """Instruction sets that are compiled in and supported by this machine."""
    from . import build_info

    cpu = build_info()["cpu"]
    found = {"baseline", *cpu["isa_found"]}
    return tuple(isa for isa in CPU_ISAS if isa in cpu["isa_compiled"] and isa in found)


@contextlib.contextmanager
def cpu_isa(name: str, *, force: bool = False) -> Iterator[None]:
    """Within the block every CPU kernel runs with this instruction set; afterwards with the best.

    ``force``: allows one that this CPU lacks, for tests that emulate its instructions.
    """
    torch.ops.baton_kernels.set_cpu_isa(name, force)
    try:
        yield
    finally:
        torch.ops.baton_kernels.set_cpu_isa("auto")


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within the block torch uses this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison_(x: torch.Tensor) -> torch.Tensor:
    """Fills x with NaN, inf and -inf in turn along its last dimension; integers with -2**31."""
    if not x.is_floating_point():
        return x.fill_(torch.iinfo(x.dtype).min)
    count = x.shape[-1]
    bad = x.new_tensor([float("nan"), float("inf"), float("-inf")])
    return x.copy_(bad.repeat(-(-count // 3))[:count])


def embed(x: torch.Tensor, margins: Sequence[int] | None = None) -> torch.Tensor:
    """A copy of x that is a slice of a larger, poisoned tensor; the last dimension is contiguous.

    ``margins[d]`` elements precede and follow dimension d. The default is 1, and 8 in the last
    dimension, which keeps rows of 8 elements aligned.
    """
    if margins is None:
        margins = [1] * (x.dim() - 1) + [8]
    base = poison_(x.new_empty([n + 2 * m for n, m in zip(x.shape, margins, strict=True)]))
    view = base[tuple(slice(m, m + n) for n, m in zip(x.shape, margins, strict=True))]
    view.copy_(x)
    return view


def before_a_hole(x: torch.Tensor) -> torch.Tensor:
    """A copy of x, without gaps, whose last byte is the last of its memory page (Linux).

    Dimensions keep their order in memory. The page after it must not be touched: a kernel that
    loads more than it should ends the process.
    """
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    hole = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(hole), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    start = pages * mmap.PAGESIZE - size
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start)
    return flat.as_strided(x.shape, torch.empty_like(x).stride()).copy_(x)


def storage(x: torch.Tensor) -> torch.Tensor:
    """All elements of the memory that x is a view of, including those outside x."""
    whole = x.untyped_storage()
    return x.new_empty(0).set_(whole, 0, (whole.nbytes() // x.element_size(),), (1,))


def twin(x: torch.Tensor) -> torch.Tensor:
    """The same view on a copy of the whole memory behind x."""
    copy = storage(x).clone()
    return copy.as_strided(x.shape, x.stride(), x.storage_offset())


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """Both tensors hold the same bits: equal NaNs are equal, 0.0 and -0.0 are not."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    bits = _BITS[actual.element_size()]
    differs = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if differs.any():
        where = differs.nonzero()
        first = tuple(where[0].tolist())
        raise AssertionError(
            f"{what}: {len(where)} of {actual.numel()} elements differ in bits, first at {first}: "
            f"{actual[first].item()!r} against {expected[first].item()!r}"
        )


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def _before_zeros(value: object) -> object:
    """Copies bfloat16 with zeros behind it: oneDNN's AMX products read past the end of a row and
    multiply what they find by zero, so NaN there would give NaN in plain torch."""
    if not (isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16):
        return value
    return value.new_zeros(value.numel() + 64)[: value.numel()].view(value.shape).copy_(value)


def _outputs(
    op: Callable, args: Sequence[object], kwargs: dict, dtype: torch.dtype | None
) -> tuple[torch.Tensor, ...]:
    if dtype is not None:
        args = [_cast(arg, dtype) for arg in args]
        kwargs = {name: _cast(arg, dtype) for name, arg in kwargs.items()}
    result = op(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


class Accuracy:
    """The accuracy required of an op's results for these arguments; computed once for many
    backends.

    The truth is the reference (``op``: its name, or a function that returns tensors) in float64.
    Plain torch is the reference at the dtype of the arguments, or at the dtype of the output if
    that is wider. Both the largest error and the root mean square error may be at most twice those
    of plain torch. Elements whose true value is infinite must be equal.
    """

    def __init__(self, op: str | Callable, *args: object, **kwargs: object):
        op = getattr(reference, op) if isinstance(op, str) else op
        floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        self.truths = _outputs(op, args, kwargs, torch.float64)
        args = tuple(_before_zeros(arg) for arg in args)
        self.plains = list(_outputs(op, args, kwargs, None))
        for i, plain in enumerate(self.plains):
            if torch.finfo(plain.dtype).eps < torch.finfo(floats[0].dtype).eps:
                self.plains[i] = _outputs(op, args, kwargs, plain.dtype)[i]

    def check(self, actual: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Raises AssertionError if ``actual`` is less accurate."""
        actual = actual if isinstance(actual, tuple) else (actual,)
        assert len(actual) == len(self.truths), f"{len(actual)} outputs, not {len(self.truths)}"
        for i, (got, truth, plain) in enumerate(zip(actual, self.truths, self.plains, strict=True)):
            assert got.dtype == plain.dtype, f"output {i}: {got.dtype}, expected {plain.dtype}"
            assert got.shape == truth.shape, f"output {i}: {got.shape}, expected {truth.shape}"
            if truth.numel() == 0:
                continue
            finite = truth.isfinite()
            assert torch.equal(got.double()[~finite], truth[~finite]), f"output {i}: infinities"
            assert got.isfinite()[finite].all(), f"output {i}: NaN or inf, but the truth is finite"
            truth = truth.masked_fill(~finite, 0.0)
            error = (got.double() - truth).masked_fill(~finite, 0.0)
            allowed = (plain.double() - truth).masked_fill(~finite, 0.0)
            for name, norm in (("max", _largest), ("rms", _root_mean_square)):
                # One unit in the last place of the result: rounding the exact result costs half of
                # it, and plain torch may be exact by luck if there are few elements.
                bound = 2 * norm(allowed) + torch.finfo(plain.dtype).eps * norm(truth)
                assert norm(error) <= bound, (
                    f"output {i}: {name} error {norm(error):.3e} exceeds {bound:.3e}; "
                    f"plain torch errs by {norm(allowed):.3e}"
                )


def assert_accurate(
    actual: torch.Tensor | tuple[torch.Tensor, ...],
    op: str | Callable,
    *args: object,
    **kwargs: object,
) -> None:
    """Checks that ``actual`` is as accurate as `Accuracy` of the same arguments requires."""
    Accuracy(op, *args, **kwargs).check(actual)


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@contextlib.contextmanager
def nan_in_empty() -> Iterator[None]:
    """Within the block, memory that torch allocates and nothing has written is poisoned.

    Uninitialized results of torch's operators are full of NaN. Memory from torch's CPU allocator,
    which these kernels' results use directly, has a pattern that is NaN in float32 and in every
    other number of the 16-bit types.
    """
    junk = ctypes.c_bool.in_dll(
        ctypes.CDLL(torch._C.__file__), "FLAGS_caffe2_cpu_allocator_do_junk_fill"
    )
    torch.use_deterministic_algorithms(True)
    junk.value = True
    try:
        yield
    finally:
        junk.value = False
        torch.use_deterministic_algorithms(False)


class Refusal:
    """One row of an op's table of bad arguments.

    ``changes`` replace valid arguments, by a value or by a function of the valid one. The op must
    raise ``error`` (through ``torch.ops``: ValueError) with a text that names ``argument`` (a
    regular expression). ``values``: the fault is in the elements of a tensor, which fake tensors
    do not have.
    """

    def __init__(
        self, argument: str, error: type[Exception], *, values: bool = False, **changes: object
    ) -> None:
        self.argument = argument
        self.error = error
        self.changes = changes
        self.routes = ("python", "torch.ops") if values else ("python", "fake", "torch.ops")

    def check(self, op: str, arguments: dict[str, object], route: str) -> None:
        """Calls the op with the changed arguments, and checks that it writes nothing."""
        import baton_kernels

        arguments = dict(arguments)
        for name, change in self.changes.items():
            arguments[name] = change(arguments[name]) if callable(change) else change
        error, function = self.error, getattr(baton_kernels, op)
        mode: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if route == "fake":
            mode = fake = FakeTensorMode()
            arguments = {
                name: fake.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
        elif route == "torch.ops":
            error, function = ValueError, getattr(torch.ops.baton_kernels, op)
        tensors = {
            name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)
        }
        before = {
            name: storage(x).clone()
            for name, x in tensors.items()
            if route != "fake" and x.device.type != "meta"
        }
        expected = rf"{op}: ({self.argument}) must be .+, got .+"
        try:
            with mode:
                function(**arguments)
        except Exception as raised:
            assert type(raised) is error, (
                f"{type(raised).__name__} is not {error.__name__}: {raised}"
            )
            assert re.match(expected, str(raised), re.DOTALL), f"{raised} does not match {expected}"
        else:
            raise AssertionError(f"{op} did not raise {error.__name__}: {expected}")
        for name, bits in before.items():
            assert_same_bits(storage(tensors[name]), bits, f"{name} after the refusal")


@dataclasses.dataclass
class Row:
    """One query: its query tokens and all its keys and values, unpadded."""

    query: torch.Tensor  # [query tokens, num_heads, head_dim]
    key: torch.Tensor  # [tokens, num_kv_heads, head_dim]
    value: torch.Tensor  # [tokens, num_kv_heads, head_dim]


@dataclasses.dataclass
class AttentionProblem:
    """The tensor arguments of ``ragged_attention``, in its order."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def split(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """The part of a packed output that belongs to each row."""
        bounds = self.cu_seqlens_q.tolist()
        return [packed[bounds[i] : bounds[i + 1]] for i in range(len(bounds) - 1)]

    def padding(self) -> torch.Tensor:
        """The columns that no row covers: bool ``[num_slots, capacity]``."""
        num_slots, _, capacity, _ = self.key_cache.shape
        padding = torch.ones(num_slots, capacity, dtype=torch.bool)
        shape = zip(self.slots.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True)
        for slot, start, length in shape:
            padding[slot, start : start + length] = False
        return padding

    def with_padding(self, fill: float) -> "AttentionProblem":
        """The same problem with every padding column set to one value."""
        padding = self.padding()[:, None, :, None].to(self.key_cache.device)
        caches = [twin(cache) for cache in (self.key_cache, self.value_cache)]
        for cache in caches:
            cache.masked_fill_(padding, fill)
        return dataclasses.replace(self, key_cache=caches[0], value_cache=caches[1])


def random_rows(
    query_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Rows of normally distributed numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype=dtype, device=device)

    return [
        Row(
            normal(query_length, num_heads, head_dim),
            normal(length, num_kv_heads, head_dim),
            normal(length, num_kv_heads, head_dim),
        )
        for query_length, length in zip(query_lengths, lengths, strict=True)
    ]


def attention_problem(
    rows: Sequence[Row],
    *,
    slots: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    num_slots: int | None = None,
    capacity: int | None = None,
    columns_first: bool = False,
    margins: Sequence[int] | None = None,
    seed: int = 0,
) -> AttentionProblem:
    """Places rows in two caches in which every other column is poisoned.

    Without ``slots`` and ``starts`` the places are random. ``columns_first`` stores the caches as
    ``[num_slots, capacity, num_kv_heads, head_dim]`` and passes a transposed view. ``margins``: see
    `embed`.
    """
    device = rows[0].key.device
    generator = torch.Generator().manual_seed(seed)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    lengths = [len(row.key) for row in rows]
    num_slots = len(rows) + 2 if num_slots is None else num_slots
    capacity = max(lengths) + 5 if capacity is None else capacity
    if slots is None:
        slots = torch.randperm(num_slots, generator=generator)[: len(rows)].tolist()
    if starts is None:
        starts = [below(capacity - length + 1) for length in lengths]
    caches = []
    for name in ("key", "value"):
        _, num_kv_heads, head_dim = getattr(rows[0], name).shape
        cache = rows[0].key.new_empty(num_slots, num_kv_heads, capacity, head_dim)
        poison_(cache)
        for row, slot, start, length in zip(rows, slots, starts, lengths, strict=True):
            cache[slot, :, start : start + length] = getattr(row, name).transpose(0, 1)
        if columns_first:
            caches.append(embed(cache.transpose(1, 2).contiguous(), margins).transpose(1, 2))
        else:
            caches.append(embed(cache, margins))
    return AttentionProblem(
        query=embed(torch.cat([row.query for row in rows]), margins and margins[1:]),
        key_cache=caches[0],
        value_cache=caches[1],
        cu_seqlens_q=cumulative([len(row.query) for row in rows], device),
        slots=int32(slots, device),
        starts=int32(starts, device),
        lengths=int32(lengths, device),
    )


def random_attention_problem(
    query_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **placement: Any,
) -> AttentionProblem:
    """`random_rows` of these lengths, placed by `attention_problem` (which takes ``placement``)."""
    rows = random_rows(
        query_lengths, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, seed=seed, device=device,
    )  # fmt: skip
    return attention_problem(rows, seed=seed, **placement)
