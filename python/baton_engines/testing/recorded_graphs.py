"""CUDA graphs on a machine without a GPU: captures a relay's steps for tests.

As on a GPU, a capture runs nothing, a replay runs no host code, work is done no sooner than the
host waits for it, rows in slot -1 are skipped, and it is an error if the host would wait in
between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Functions of torch and methods of tensors whose results the host waits for, or that take values
# from the host, by the name under which they are called...
_HOST = frozenset(
    (
        *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
        *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal"),
        *("tensor", "as_tensor", "from_numpy", "allclose", "is_nonzero", "__contains__"),
    )
)
# ... and as operators, however they are called.
_HOST_OPERATORS = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"),
        "lift_fresh",
    )
)
_WITH_SLOTS = ("baton_kernels::append_kv", "baton_kernels::ragged_attention")
# Arguments of these ops with one entry per row, besides the slots.
_ROWS = ("key", "value", "columns", "query", "cos", "sin", "starts", "lengths")


class HostWaitError(RuntimeError):
    """The host would have waited for the device, or a host value would be fixed in the capture."""


class HostReads(TorchFunctionMode):
    """Counts calls that would make the host wait for a GPU; during a capture, raises instead.

    Args:
        runtime: its host buffers may be read, and its own work does not count; None during a
            capture.

    Attributes:
        found: names of the calls.
    """

    def __init__(self, runtime: RecordedGraphs | None = None) -> None:
        super().__init__()
        self._runtime = runtime
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._waits(name, args, kwargs):
            self.found.append(name)
            if self._runtime is None:
                raise HostWaitError(f"{name} makes the host wait for the device")
        return func(*args, **kwargs)

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        runtime = self._runtime
        if name == "to":
            return any(isinstance(x, (str, torch.device)) for x in (*args[1:], *kwargs.values()))
        if name not in _HOST or (runtime is not None and runtime.is_working):
            return False
        if name == "tensor" and runtime is not None:
            # Between two captures the host may create tensors that stay on the host.
            return kwargs.get("device") is not None
        return not (runtime is not None and _is_tensor(args[0]) and runtime.is_host(args[0]))


class _Call(NamedTuple):
    """A recorded call of an operator."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # The tensors that it created and returned: memory that each replay writes again.
    made: list[torch.Tensor | None]

    def replay(self) -> None:
        results = tree_flatten(_on_device(self.func, self.args, self.kwargs))[0]
        for target, result in zip(self.made, results, strict=True):
            if target is not None:
                target.copy_(result)


class _Recorder(TorchDispatchMode):
    """Records operators. Tensors that they write keep their values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = func._schema.name
        masked = name.startswith("aten::index") and any(
            _is_tensor(x) and x.dtype in (torch.bool, torch.uint8)
            for x in tree_flatten(args[1:])[0]
        )
        if name in _HOST_OPERATORS or masked:
            raise HostWaitError(f"{name} makes the host wait for the device")
        written = {
            index for index, argument in enumerate(func._schema.arguments) if _writes(argument)
        }
        assert not any(_writes(a) and a.name in kwargs for a in func._schema.arguments)
        given = args
        if name not in _WITH_SLOTS:
            given = tuple(x.clone() if i in written else x for i, x in enumerate(args))
        result = _on_device(func, given, kwargs, skip=True)
        for index in written:
            # An in-place operator returns the tensor that it has written.
            result = args[index] if result is given[index] else result
        taken = {_address(x) for x in tree_flatten((args, kwargs))[0] if _is_tensor(x)}
        results = tree_flatten(result)[0]
        made = [x if _is_tensor(x) and _address(x) not in taken else None for x in results]
        # Creating a view is not work of the device.
        if written or any(x is not None for x in made):
            self.calls.append(_Call(func, args, kwargs, made))
        return result

    def inputs(self) -> list[torch.Tensor]:
        """Tensors that are read and that no recorded call has created."""
        made = {_address(x) for call in self.calls for x in call.made if x is not None}
        given = (x for call in self.calls for x in tree_flatten((call.args, call.kwargs))[0])
        return [x for x in given if _is_tensor(x) and _address(x) not in made]

    def forget_results(self) -> None:
        """Poison everything that only a replay may write."""
        for call in self.calls:
            for x in call.made:
                if x is not None and x.dtype.is_floating_point:
                    x.fill_(torch.nan)
                elif x is not None and x.dtype != torch.bool:
                    x.fill_(torch.iinfo(x.dtype).min)


class _Device(TorchDispatchMode):
    """Operators as a GPU runs them: rows in slot -1 are skipped."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return _on_device(func, args, kwargs or {})


class RecordedGraphs:
    """A `GraphRuntime` on the CPU; give it to `Relay(cuda_graphs=)`.

    Attributes:
        copies_in, copies_out, waits, replays, captures: how often each happened.
        refuses: an exception that each capture raises, or None.
        inputs: tensors that the newest graph reads but does not create.
        is_working: whether it is doing the device's work at the moment.
    """

    def __init__(self) -> None:
        self.copies_in = self.copies_out = self.waits = self.replays = self.captures = 0
        self.refuses: Exception | None = None
        self.inputs: list[torch.Tensor] = []
        self.is_working = False
        self._queue: list[Callable[[], object]] = []
        self._host: dict[int, torch.Tensor] = {}

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """The numbers of copies in, replays, copies out, waits and captures."""
        return self.copies_in, self.replays, self.copies_out, self.waits, self.captures

    def is_host(self, x: torch.Tensor) -> bool:
        """Whether it is a host buffer or a part of one."""
        return _address(x) in self._host

    def host_buffer(self, size: int) -> torch.Tensor:
        """See `GraphRuntime.host_buffer`; poisoned."""
        buffer = torch.full((size,), torch.iinfo(torch.int32).min, dtype=torch.int32)
        self._host[_address(buffer)] = buffer
        return buffer

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `GraphRuntime.copy`."""
        comes, goes = self.is_host(source), self.is_host(target)
        assert comes != goes, "a copy between the host and the device"
        self.copies_in += comes
        self.copies_out += goes
        given = source.clone() if comes else None

        def work() -> None:
            assert given is None or torch.equal(source, given), "written before it was copied"
            target.copy_(source)

        self._queue.append(work)

    def run(self, function: Callable[[], None]) -> None:
        """See `GraphRuntime.run`."""

        def launch() -> None:
            with _Device():
                function()

        self._queue.append(launch)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `GraphRuntime.capture`.

        Raises:
            HostWaitError: the function waits for the device, or copies values of the host.
        """
        self.captures += 1
        if self.refuses is not None:
            raise self.refuses
        recorder = _Recorder()
        with HostReads(), recorder:
            function()
        recorder.forget_results()
        self.inputs = recorder.inputs()

        def replay() -> None:
            self.replays += 1
            self._queue += [call.replay for call in recorder.calls]

        return replay

    def wait(self) -> None:
        """See `GraphRuntime.wait`: all work is done now."""
        self.waits += 1
        queue, self._queue = self._queue, []
        self.is_working = True
        try:
            for work in queue:
                work()
        finally:
            self.is_working = False

    def forget(self) -> None:
        """See `GraphRuntime.forget`."""
        self.inputs = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[HostReads]:
        """Within the block, counts calls other than `wait` that make the host wait."""
        with HostReads(self) as reads:
            yield reads


def _on_device(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, skip: bool = False
) -> object:
    """Calls the operator. Ops with slots skip rows without one, or all rows with `skip`."""
    if func._schema.name not in _WITH_SLOTS:
        return func(*args, **kwargs)
    named = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
    query = named.get("query")
    if query is not None:
        # No kernel is required to write anything for a row that it skips.
        given = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    used = (named["slots"] >= 0).nonzero().view(-1)
    if not skip and len(used):
        own = {key: x[used] if key in _ROWS and x is not None else x for key, x in named.items()}
        own["slots"] = named["slots"][used]
        if "cu_seqlens_q" in named:
            bounds = named["cu_seqlens_q"]
            assert bounds.tolist() == list(range(len(named["slots"]) + 1)), "one token per row"
            own["cu_seqlens_q"] = bounds[: len(used) + 1]
        result = func(**own)
        if query is not None:
            given[used] = result
    return None if query is None else given


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
