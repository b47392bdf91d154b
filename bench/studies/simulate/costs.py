"""The duration of a forward: what it computes, and two models of the seconds for that.

`Roofline` uses published numbers and guessed efficiency factors, so its results are consequences of
assumptions, not measurements. `Measured` is fitted to forwards that this machine has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from baton_engines.policies import Work


class Cost(NamedTuple):
    """The duration of a forward that has the device to itself, and its share of the device.

    Attributes:
        seconds: when it runs by itself.
        compute, memory: its shares of the arithmetic rate and of the bandwidth then.
    """

    seconds: float
    compute: float = 1.0
    memory: float = 1.0


class CostModel(Protocol):
    """The interface between the simulation and a machine with a model on it."""

    # Bytes of one token's keys and values.
    bytes_per_token: float

    def forward(self, work: Work) -> Cost:
        """The cost of one forward."""

    def copy(self, num_bytes: float) -> float:
        """Seconds for copying cached bytes within the device's memory."""


@dataclass(frozen=True)
class Model:
    """A Llama in fp16; all numbers are from its published configuration."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' linear maps."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Weights of the output projection."""
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        """Bytes of layers, embedding and output projection."""
        return 2 * (self.layer_parameters + 2 * self.head_parameters)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads)


@dataclass(frozen=True)
class Device:
    """A GPU; all numbers are from its maker's data sheet, for dense fp16.

    Attributes:
        flops: tensor core operations per second.
        bandwidth: of its memory, bytes per second.
        memory: bytes.
        link: bytes per second in one direction to the next device.
        link_name: the kind of link.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    link_name: str


MODELS = {
    model.name: model
    for model in (
        Model("llama-7b", 32, 4096, 32, 32, 11008),
        Model("llama-13b", 40, 5120, 40, 40, 13824),
        Model("llama-70b", 80, 8192, 64, 8, 28672),
    )
}
DEVICES = {
    device.name: device
    for device in (
        Device("T4", 65e12, 320e9, 16e9, 16e9, "PCIe 3.0 x16"),
        Device("A100-80G", 312e12, 2039e9, 80e9, 300e9, "NVLink 3"),
        Device("H100", 989e12, 3350e9, 80e9, 450e9, "NVLink 4"),
    )
}


@dataclass(frozen=True)
class Roofline:
    """Seconds from published peaks: per group of kernels, the slower of arithmetic and memory.

    A forward consists of three groups, one after the other: the linear layers, which read the
    weights once; the attention of decoding rows, which reads their keys and values; and the
    attention of rows that prefill. `seconds = sum of max(flops / rate, bytes / bandwidth) +
    overhead`.

    Args:
        device: one of `DEVICES`.
        model: one of `MODELS`.
        parallel: devices that share every layer (tensor parallel); each layer then costs two
            all-reduces in a ring over the link.
        compute_share, memory_share: shares of the peaks that kernels reach.
        kernels_per_layer, launch_seconds: the overhead of a forward, which is never hidden.
        kernels_per_row: kernels per layer that are launched again for every row: 0 for one
            attention kernel over all rows, more for an engine that calls attention per request.
    """

    device: Device
    model: Model
    parallel: int = 1
    compute_share: float = 0.6
    memory_share: float = 0.8
    kernels_per_layer: int = 8
    launch_seconds: float = 4e-6
    kernels_per_row: int = 0

    # Time of one hop of an all-reduce, in addition to its bytes.
    HOP_SECONDS = 5e-6

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's keys and values, on all devices together."""
        return self.model.bytes_per_token

    @property
    def kv_bytes(self) -> float:
        """Bytes for keys and values: nine tenths of the memory, minus the weights."""
        return 0.9 * self.device.memory * self.parallel - self.model.weight_bytes

    @cached_property
    def _constants(self) -> tuple[float, ...]:
        # Cached, because a simulation needs the costs of millions of forwards.
        model, device = self.model, self.device
        return (
            device.flops * self.compute_share * self.parallel,
            device.bandwidth * self.memory_share * self.parallel,
            2.0 * model.layer_parameters,
            2.0 * model.head_parameters,
            4.0 * model.layers * model.hidden,
            float(model.bytes_per_token),
        )

    def forward(self, work: Work) -> Cost:
        """The cost of one forward."""
        rate, bandwidth, layers, head, pair, column = self._constants
        # Linear layers; attention of decoding rows; attention of prefilling rows.
        flops = (
            layers * work.tokens + head * work.rows,
            pair * work.decode_columns,
            pair * work.pairs,
        )
        # Two bytes and two operations per weight, so the weights' bytes equal the operations per
        # token.
        moved = (
            layers + (head if work.rows else 0.0) + column * work.tokens,
            column * work.decode_columns,
            column * work.prefill_columns,
        )
        busy = (
            max(flops[0] / rate, moved[0] / bandwidth)
            + max(flops[1] / rate, moved[1] / bandwidth)
            + max(flops[2] / rate, moved[2] / bandwidth)
        )
        launches = self.model.layers * (self.kernels_per_layer + self.kernels_per_row * work.rows)
        seconds = busy + launches * self.launch_seconds + self._all_reduce(work.tokens)
        return Cost(seconds, sum(flops) / rate / seconds, sum(moved) / bandwidth / seconds)

    def copy(self, num_bytes: float) -> float:
        """Seconds to read and write."""
        return 2 * num_bytes / (self.device.bandwidth * self.memory_share * self.parallel)

    def transfer(self, num_bytes: float) -> float:
        """Seconds of a transfer to another group of devices; every device of a group has its own
        link."""
        return self.HOP_SECONDS + num_bytes / (self.device.link * self.memory_share * self.parallel)

    def _all_reduce(self, tokens: int) -> float:
        if self.parallel == 1:
            return 0.0
        hops = 2 * (self.parallel - 1)
        part = 2 * tokens * self.model.hidden / self.parallel
        hop = self.HOP_SECONDS + part / (self.device.link * self.memory_share)
        return 2 * self.model.layers * hops * hop


def roofline(device: str, model: str, **options) -> Roofline:
    """A machine by name, with the fewest devices (a power of two) that hold the model.

    They hold it if the weights leave a quarter of the memory for keys and values.

    Args:
        device: one of `DEVICES`.
        model: one of `MODELS`.
        options: of `Roofline`; `parallel` replaces the fewest.

    Raises:
        ValueError: there is no such device or model.
    """
    for what, name, known in (("device", device, DEVICES), ("model", model, MODELS)):
        if name not in known:
            raise ValueError(f"roofline: {what} must be one of {', '.join(known)}, got {name!r}")
    chosen, llama = DEVICES[device], MODELS[model]
    parallel = 1
    while llama.weight_bytes > 0.75 * chosen.memory * parallel:
        parallel *= 2
    return Roofline(chosen, llama, **{"parallel": parallel, **options})
