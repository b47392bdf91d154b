"""Makes hostile calls and judges them: seeded, in processes that are replaced when they die.

A call must not end the process, touch a byte outside of its tensors, change anything when it is
rejected, write outside the elements of the tensors that its schema says are written, depend on how
tensors lie in memory or share it (an accepted call must have the bits of the same call on copies),
or be accepted where the fake implementation rejects it.
"""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import mmap
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from guarded_memory import PAGE, REGION_BYTES, Region, extent_bytes, strides_of
from hostile_calls import FLOATS, Described, draw_call

from baton_kernels.testing import available_cpu_isas

MOST_TENSORS = 15
# Seconds that a call of these sizes may take, even on a busy machine.
PATIENCE_S = 240
# Memory that a process may use on top of what it has before its first call.
MOST_BYTES = 2**29
# This many calls in succession run with one instruction set.
CALLS_PER_ISA = 256


class WrongError(Exception):
    """A call did something that it must not do."""


class LayoutError(Exception):
    """The described tensor does not fit a region: there is no such call."""


@dataclasses.dataclass
class Laid:
    """Where a tensor lies: bytes of a region."""

    region: Region
    begin: int
    end: int


class Caller:
    """Places the arguments of calls in its regions, makes the calls and judges them."""

    def __init__(self) -> None:
        self.regions = [Region(REGION_BYTES) for _ in range(MOST_TENSORS)]
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(REGION_BYTES // 2, generator=generator)
        self.floats = {dtype: normal.to(dtype) for dtype in FLOATS}
        self.isas = available_cpu_isas()

    def make(self, seed: int, index: int) -> str:
        """Makes one call and returns how it ended. Raises WrongError."""
        r = Random(f"{seed}:{index}")
        torch.ops.baton_kernels.set_cpu_isa(self.isas[index // CALLS_PER_ISA % len(self.isas)])
        op, overload, described = draw_call(r)
        native = getattr(getattr(torch.ops.baton_kernels, op), overload)
        try:
            arguments, windows = self.lay(r, described)
        except LayoutError:
            return "not laid out"
        try:
            return f"{op}.{overload}: " + self.judge(r, native, arguments, windows)
        finally:
            for laid in windows.values():
                laid.region.may_change[laid.begin : laid.end] = 0

    # Memory

    def lay(self, r: Random, described: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Laid]]:
        """Arguments of the call, and the bytes of each region that it may access."""
        places: dict[str, Laid] = {}
        windows: dict[int, Laid] = {}
        arguments = dict(described)
        tensors = {k: v for k, v in described.items() if isinstance(v, Described)}
        pending = dict(tensors)
        while pending:
            name = next(
                (k for k, v in pending.items() if v.inside is None or v.inside[0] in places),
                next(iter(pending)),
            )
            tensor = pending.pop(name)
            if tensor.inside is not None and tensor.inside[0] not in places:
                tensor.inside = None  # a circle of such
            arguments[name] = self.place(r, name, tensor, places, windows)
        # Index values are written last, so that the call finds them even in shared memory.
        for name, tensor in tensors.items():
            self.fill(r, arguments[name], tensor)
        for name, tensor in tensors.items():
            arguments[name] = stored(arguments[name], tensor.stored)
        return arguments, windows

    def place(self, r, name, tensor, places, windows) -> torch.Tensor:
        strides, item = strides_of(tensor, r.randrange(1000)), tensor.dtype.itemsize
        if tensor.device == "meta":
            return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
        size = extent_bytes(tensor.shape, strides, item)
        if tensor.inside is not None:
            other = places[tensor.inside[0]]
            region, begin = other.region, (other.begin + tensor.inside[1]) // item * item
        else:
            region = self.regions[len(windows)]
            begin = (REGION_BYTES - size) // item * item if tensor.at_end else 0
        if not 0 <= begin <= begin + size <= REGION_BYTES:
            raise LayoutError
        places[name] = Laid(region, begin, begin + size)
        number = self.regions.index(region)
        low, high = max(begin - PAGE, 0), min(begin + size + PAGE, REGION_BYTES)
        window = windows.setdefault(number, Laid(region, low, high))
        window.begin, window.end = min(window.begin, low), max(window.end, high)
        return region.flat[tensor.dtype].as_strided(tensor.shape, strides, begin // item)

    def fill(self, r: Random, laid: torch.Tensor, tensor: Described) -> None:
        if laid.is_meta or laid.numel() == 0:
            return
        if tensor.values is not None:
            values = [min(max(v, -(2**31)), 2**31 - 1) for v in tensor.values]
            if laid.dtype.itemsize >= 4:
                new = torch.tensor(values).view(tensor.shape).to(laid.dtype)
                for place in np.ndindex(*tensor.shape):  # elements may share their memory
                    laid[place] = new[place]
        elif tensor.dtype in FLOATS and tensor.inside is None:
            count = sum((n - 1) * s for n, s in zip(laid.shape, laid.stride(), strict=True)) + 1
            begin = r.randrange(1000)
            flat = laid.as_strided((count,), (1,), laid.storage_offset())
            flat.copy_(self.floats[tensor.dtype][begin : begin + count])

    # Judgment

    def judge(self, r, native, arguments, windows) -> str:
        before = [laid.region.bytes[laid.begin : laid.end].copy() for laid in windows.values()]
        plain = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        is_plain = all(x.layout == torch.strided and not x.is_neg() and x.device.type == "cpu"
                       and not x.is_nested for x in plain)  # fmt: skip
        copies = {
            name: x.clone(memory_format=torch.contiguous_format) if is_tensor(x) else x
            for name, x in arguments.items()
        } if is_plain else {}  # fmt: skip
        torch.set_num_threads(r.choice((1, 1, 1, 2, 3)))
        try:
            results = native(**arguments)
        except Exception as error:
            self.compare(windows, before, "it was refused")
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            torch.set_num_threads(1)
        written = [
            x.name for x in native._schema.arguments
            if x.alias_info is not None and x.alias_info.is_write and is_tensor(arguments[x.name])
        ]  # fmt: skip
        if not is_plain:
            written = [name for name in written if arguments[name].layout == torch.strided
                       and arguments[name].device.type == "cpu"]  # fmt: skip
        for name in written:
            for laid in windows.values():
                memory = laid.region.flat[torch.uint8]
                if memory.untyped_storage().data_ptr() == (
                    arguments[name].untyped_storage().data_ptr()
                ):
                    laid.region.allow(arguments[name])
        self.compare(windows, before, "it is outside of what is written")
        if is_plain:
            self.compare_with_copies(native, arguments, copies, written, results)
        return "accepted"

    def compare(self, windows, before, what: str) -> None:
        for laid, old in zip(windows.values(), before, strict=True):
            changed = laid.region.bytes[laid.begin : laid.end] != old
            changed &= laid.region.may_change[laid.begin : laid.end].numpy() == 0
            if changed.any():
                place = int(changed.argmax()) + laid.begin
                raise WrongError(f"byte {place} of a region changed, although {what}")

    def compare_with_copies(self, native, arguments, copies, written, results) -> None:
        expected = native(**copies)
        for name in written:
            if not same(arguments[name], copies[name]):
                raise WrongError(f"{name} is not what the same call writes into a copy")
        for got, want in zip(as_tuple(results), as_tuple(expected), strict=True):
            if not same(got, want):
                raise WrongError("the result is not that of the same call on copies")
        fakes = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            if is_tensor(x) else x
            for name, x in arguments.items()
        }  # fmt: skip
        try:
            faked = native(**fakes)
        except Exception as error:
            raise WrongError(f"the fake implementation refuses it: {error}") from error
        for got, want in zip(as_tuple(results), as_tuple(faked), strict=True):
            if (got.shape, got.dtype, got.stride()) != (want.shape, want.dtype, want.stride()):
                raise WrongError(f"the fake result is {want.shape} {want.dtype} {want.stride()}")


def stored(tensor: torch.Tensor, how: str) -> torch.Tensor:
    # torch makes none of the others of float8.
    if tensor.is_meta or (how != "negated" and tensor.dtype == torch.float8_e4m3fn):
        return tensor
    if how == "sparse":
        return tensor.to_sparse()
    if how == "negated" and tensor.dtype != torch.bool:
        return torch._neg_view(tensor)
    if how == "nested" and tensor.dim() > 1 and tensor.is_floating_point():
        return torch.nested.nested_tensor(list(tensor.unbind(0)))
    return tensor


def is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def as_tuple(results: Any) -> tuple:
    return () if results is None else results if isinstance(results, tuple) else (results,)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, or NaN in both."""
    if a.dtype == torch.float8_e4m3fn == b.dtype:
        a, b = a.view(torch.int8), b.view(torch.int8)
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def kind(outcome: str) -> str:
    """An outcome without the values in it: outcomes of one kind test the same thing."""
    expected = re.split(r", got | but instead|, where |\. Position|: arguments", outcome)[0]
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?|\[[^\]]*\]", "#", expected)[:120]


@dataclasses.dataclass
class Report:
    """The results of a run of calls."""

    calls: int = 0
    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, int] = dataclasses.field(default_factory=dict)  # index of a kind's first call
    wrong: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    deaths: int = 0

    @property
    def accepted(self) -> int:
        return sum(n for name, n in self.outcomes.items() if name.endswith(": accepted"))


def run(seed: int, indices: list[int], seconds: float = 0.0, say: Any = None) -> Report:
    """Makes these calls in child processes; stops after this many seconds, if given.

    A child writes the number of each call into shared memory before making it. So the parent knows
    which call ended the child, and continues with a new child after that call.
    """
    report, at, end = Report(), 0, time.monotonic() + seconds
    position = mmap.mmap(-1, PAGE)
    while at < len(indices) and (not seconds or time.monotonic() < end):
        with tempfile.TemporaryFile("w+") as notes:
            struct.pack_into("q", position, 0, at)
            child = os.fork()
            if child == 0:
                _child(seed, indices, at, end if seconds else 0.0, position, notes)
            status = _wait(child, position)
            stopped = struct.unpack_from("q", position)[0]
            notes.seek(0)
            for line in notes:
                place, is_wrong, outcome = line.rstrip("\n").split("\t", 2)
                index = indices[int(place)]
                if is_wrong == "1":
                    report.wrong.append((index, outcome))
                else:
                    report.outcomes[kind(outcome)] += 1
                    report.first.setdefault(kind(outcome), index)
                report.calls += 1
        at = stopped
        if status != 0:
            report.deaths += 1
            report.calls += 1
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            report.wrong.append((indices[min(at, len(indices) - 1)], f"ended the process: {name}"))
            at += 1
        if say is not None:
            say(report)
    return report


# A new process now and then, so that leaks do not add up.
CALLS_PER_CHILD = 5000


def _child(seed, indices, at, end, position, notes) -> None:
    status, parent = 1, os.getppid()
    try:
        faulthandler.enable()
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        limit_memory()
        caller = Caller()
        for place in range(at, min(at + CALLS_PER_CHILD, len(indices))):
            struct.pack_into("q", position, 0, place)
            if (end and time.monotonic() > end) or os.getppid() != parent:
                break
            try:
                outcome, wrong = caller.make(seed, indices[place]), 0
            except WrongError as error:
                outcome, wrong = str(error), 1
            outcome = outcome.replace("\n", " ")
            notes.write(f"{place}\t{wrong}\t{outcome}\n")
            notes.flush()
        else:
            struct.pack_into("q", position, 0, min(at + CALLS_PER_CHILD, len(indices)))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def limit_memory() -> None:
    """A call may request a result of any size: it gets an error, not the machine's memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))


def _wait(child: int, position: mmap.mmap) -> int:
    """The child's exit status, negative for a signal; a call that does not end is killed."""
    last, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        place = struct.unpack_from("q", position)[0]
        if place != last:
            last, since = place, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


CORPUS = Path(__file__).with_name("hostile_corpus.txt")


def corpus() -> tuple[int, list[int]]:
    """The seed and the calls of the corpus: the first of every kind of outcome seen so far."""
    lines = [line for line in CORPUS.read_text().splitlines() if not line.startswith("#")]
    seed, *indices = (int(word) for line in lines for word in line.split())
    return seed, indices
