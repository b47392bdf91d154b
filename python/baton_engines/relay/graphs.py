"""Decode steps of a relay as CUDA graphs: per step one copy to the device, one replay, one copy
back and one wait.

A graph keeps the launches of a step with their arguments. So everything that differs between two
steps lies in buffers with fixed addresses: token, slot, start, length, column and position of every
row as inputs, the likeliest token of every row as output. If a batch has fewer rows than a graph,
the others are idle, in slot -1. Steps with prompt tokens have no graph.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from baton_kernels import likeliest

from ..llama.packed_batch import PackedBatch
from ..slots import Row, Slots

_log = logging.getLogger(__name__)

# The inputs of a row, in the order of the buffer.
_FIELDS = ("token_ids", "slots", "starts", "lengths", "columns", "positions")
# Token, start, length, column and position are arbitrary: kernels ignore rows in slot -1.
_IDLE = (0, -1, 0, 0, 0, 0)
# Up to this number, the rows of a graph are a power of two, above it a multiple of this.
_ROWS = 8
# Attention is laid out for a longest row; for graphs its length is a power of two from this on.
_LENGTH = 1024
# The number of graphs that are kept; the least recently used is dropped first.
_MOST_GRAPHS = 64


class GraphRuntime(Protocol):
    """The device operations that graphs need. Work is done in the order of the calls, and only
    `wait` waits for it."""

    def host_buffer(self, size: int) -> torch.Tensor:
        """int32 `[size]` in memory that the device can copy from and to by itself."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between a host buffer and the device, in either direction."""

    def run(self, function: Callable[[], None]) -> None:
        """Call a function whose work is launched by the host."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that repeats the device's work of `function`, which is not executed
        now. `function` must have been run before."""

    def wait(self) -> None:
        """Return when all work is done."""

    def forget(self) -> None:
        """All graphs have been dropped: release their memory."""


class CudaRuntime:
    """`GraphRuntime` on one GPU, on torch's current stream there.

    Args:
        device: of type cuda, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()
        with torch.cuda.device(device):
            # torch.cuda.graph would use a stream of the first device for all devices.
            self._stream = torch.cuda.Stream(device)
            self._event = torch.cuda.Event()

    def host_buffer(self, size: int) -> torch.Tensor:
        """See `GraphRuntime.host_buffer`: pinned."""
        return torch.empty(size, dtype=torch.int32, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `GraphRuntime.copy`."""
        target.copy_(source, non_blocking=True)

    def run(self, function: Callable[[], None]) -> None:
        """See `GraphRuntime.run`."""
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `GraphRuntime.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Not "global": a thread that computes prompts may allocate memory during the capture.
        captured = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self._device), captured:
            function()
        return graph.replay

    def wait(self) -> None:
        """See `GraphRuntime.wait`."""
        self._event.record(torch.cuda.current_stream(self._device))
        self._event.synchronize()

    def forget(self) -> None:
        """See `GraphRuntime.forget`."""
        # One pool for all graphs, which never run at the same time. Torch releases a pool with its
        # last graph and adds no others to it.
        self._pool = torch.cuda.graph_pool_handle()


class Decoded(NamedTuple):
    """A step's results.

    Attributes:
        logits: float32 `[rows, vocab]`, until the next step.
        tokens: of every row, the likeliest one; -1 where the logits are not finite.
        replayed: whether a graph computed them, rather than the host's launches before its capture.
    """

    logits: torch.Tensor
    tokens: list[int]
    replayed: bool


class _Buffers:
    """The memory that all graphs of a cache read and write."""

    def __init__(self, slots: Slots, runtime: GraphRuntime) -> None:
        rows, device = slots.num_slots, slots.cache.keys.device
        self.host_rows = runtime.host_buffer(len(_FIELDS) * rows)
        self.rows = torch.zeros(len(_FIELDS) * rows, dtype=torch.int32, device=device)
        self.host_tokens = runtime.host_buffer(rows)
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        # Shared by all graphs: one per graph size would take as much memory as keys and values.
        self.logits = torch.zeros(rows, slots.model.vocab_size, device=device)
        self.counts = torch.arange(rows + 1, dtype=torch.int32, device=device)


class DecodeGraphs:
    """The graphs of one cache, captured when a step first needs them.

    Args:
        slots: of a model whose `can_be_captured` is True.
        runtime: of the cache's device.
    """

    def __init__(self, slots: Slots, runtime: GraphRuntime) -> None:
        self._slots = slots
        self._runtime = runtime
        self._usable = True
        # Whether an interrupted step may still be using the buffers.
        self._busy = False
        self._buffers: _Buffers | None = None
        # The addresses that the graphs depend on, and the graphs by rows and length.
        self._addresses: tuple[int, ...] = ()
        self._graphs: OrderedDict[tuple[int, int], Callable[[], None]] = OrderedDict()

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether these rows form a step that graphs support: one token each, no prompt."""
        return self._usable and all(row.query.tokens and row.num_tokens == 1 for row in rows)

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> Decoded:
        """Compute the next token of rows whose columns are reserved.

        Args:
            rows: rows for which `takes` returns True.

        Raises:
            Exception: what the model raises.
        """
        lines, longest = self._lines(rows)
        count = _rounded_rows(len(rows), self._slots.num_slots)
        longest = _rounded_length(longest, self._slots.cache.shape.capacity)
        lines += [_IDLE] * (count - len(rows))
        buffers = self._prepare(longest)
        end = len(_FIELDS) * count
        # The tokens of all rows, then the slots of all rows, and so on.
        buffers.host_rows[:end] = torch.tensor(
            list(zip(*lines, strict=True)), dtype=torch.int32
        ).view(-1)
        self._busy = True
        self._runtime.copy(buffers.rows[:end], buffers.host_rows[:end])
        replayed = self._launch(buffers, count, longest)
        self._runtime.copy(buffers.host_tokens[:count], buffers.tokens[:count])
        self._runtime.wait()
        self._busy = False
        tokens = buffers.host_tokens[: len(rows)].tolist()
        return Decoded(buffers.logits[: len(rows)], tokens, replayed)

    def release(self) -> None:
        """Release all memory; the next step allocates it again."""
        self._drain()
        self._graphs.clear()
        self._runtime.forget()
        self._addresses = ()
        self._buffers = None

    def _lines(self, rows: Sequence[Row]) -> tuple[list[tuple[int, ...]], int]:
        """The inputs of each row, in the order of `_FIELDS`, and the length of the longest."""
        shape = self._slots.cache.shape
        lines: list[tuple[int, ...]] = []
        longest = 0
        for query, count in rows:
            slot = query.slot
            assert slot is not None
            length, start = shape.length(slot), shape.start(slot)
            (token,) = query.pending_tokens(count)
            lines.append((token, slot, start, length, start + length - 1, length - 1))
            longest = max(longest, length)
        return lines, longest

    def _prepare(self, longest: int) -> _Buffers:
        """Returns the buffers; drops all graphs if something that they depend on has moved."""
        self._drain()
        cache = self._slots.cache
        own = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        addresses = (
            *(x.data_ptr() for x in own if x is not None), self._slots.num_slots,
            *self._slots.model.addresses(longest),
        )  # fmt: skip
        if addresses != self._addresses:
            self.release()
            self._addresses = addresses
        if self._buffers is None:
            self._buffers = _Buffers(self._slots, self._runtime)
        return self._buffers

    def _launch(self, buffers: _Buffers, count: int, longest: int) -> bool:
        """Compute the step whose inputs are in the buffers; returns whether a graph did."""
        graph = self._graphs.get((count, longest))
        if graph is not None:
            self._graphs.move_to_end((count, longest))
            graph()
            return True
        step = functools.partial(self._step, buffers, count, longest)
        # Computes the step. It also loads the kernels, which the capture must not have to do.
        self._runtime.run(step)
        try:
            self._graphs[count, longest] = self._runtime.capture(step)
        except Exception as error:
            _log.warning("decode steps go on without CUDA graphs", exc_info=error)
            self._usable = False
            self._graphs.clear()
        if len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return False

    def _step(self, buffers: _Buffers, count: int, longest: int) -> None:
        """The code that is captured: only the number of rows and bounds are fixed in it."""
        rows = dict(zip(_FIELDS, buffers.rows[: len(_FIELDS) * count].view(-1, count), strict=True))
        batch = PackedBatch(
            cu_seqlens_q=buffers.counts[: count + 1],
            slots=rows["slots"],
            starts=rows["starts"],
            lengths=rows["lengths"],
            token_slots=rows["slots"],
            token_columns=rows["columns"],
            positions=rows["positions"],
            last_tokens=buffers.counts[:count],
            query_lengths=(1,) * count,
            total_lengths=(longest,) * count,
            max_query_length=1,
            max_length=longest,
            padding=(0,) * count,
        )
        model, cache = self._slots.model, self._slots.cache
        logits = model.forward(rows["token_ids"], batch, cache, logits="last")
        buffers.logits[:count].copy_(logits)
        buffers.tokens[:count].copy_(likeliest(logits))

    def _drain(self) -> None:
        if self._busy:
            self._runtime.wait()
            self._busy = False


def open_graphs(
    slots: Slots, wanted: bool | GraphRuntime | None, shaping: str
) -> DecodeGraphs | None:
    """The graphs of a relay, or None if it uses none.

    Args:
        slots: the relay's.
        wanted: see `Relay`.
        shaping: one of `slots.SHAPINGS`.

    Raises:
        TypeError: wanted is something else.
        ValueError: it is True for a model that is not on CUDA, or with a cache that is copied
            whenever a row enters.
        NotImplementedError: it is True for a model that cannot be captured.
    """
    if wanted is None or isinstance(wanted, bool):
        runtime = None
    elif hasattr(wanted, "capture"):
        runtime = wanted
    else:
        raise TypeError(f"Relay: cuda_graphs must be True, False or None, got {wanted!r}")
    if wanted is False:
        return None
    device = slots.cache.keys.device
    error: Exception | None = None
    if runtime is None and device.type != "cuda":
        error = ValueError(
            f"Relay: cuda_graphs must be False or left out for a model on {device}, got True"
        )
    elif not slots.model.can_be_captured:
        error = NotImplementedError(
            "Relay: cuda_graphs must be False or left out for a model that runs through "
            f"{type(slots.model).__name__}, whose forward cannot be captured, got True"
        )
    elif shaping == "concatenate":
        error = ValueError(
            "Relay: cuda_graphs must be False or left out for shaping 'concatenate', whose cache "
            "is a new one whenever a row enters or leaves, got True"
        )
    if error is None:
        return DecodeGraphs(slots, runtime or CudaRuntime(device))
    if wanted is None:
        return None
    raise error


def _rounded_rows(rows: int, num_slots: int) -> int:
    """The number of rows of the smallest graph that has enough."""
    count = 1 << (rows - 1).bit_length() if rows < _ROWS else -(-rows // _ROWS) * _ROWS
    return min(count, num_slots)


def _rounded_length(length: int, capacity: int) -> int:
    return min(capacity, max(_LENGTH, 1 << (length - 1).bit_length()))
