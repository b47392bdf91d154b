"""The actor of `prefill.ray`, and how tensors travel through Ray's object store.

Ray keeps numpy arrays in a node's shared memory and maps them for every reader there. numpy has no
bfloat16, so tensors travel as bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import baton_kernels

from .base import Prefilled, compute
from .handover import Sizes


class SavedModel(NamedTuple):
    """A handle of a model as `torch.save` writes it."""

    data: Any

    @classmethod
    def of(cls, model) -> SavedModel:
        """Saves a `PatchedLlama` or a stand-in for one."""
        stream = io.BytesIO()
        torch.save(model, stream)
        return cls(torch.frombuffer(stream.getbuffer(), dtype=torch.uint8).numpy())

    def load(self):
        """A copy of the handle with its own weights."""
        return torch.load(io.BytesIO(memoryview(self.data)), weights_only=False)


class NamedModel(NamedTuple):
    """A model that every actor loads by itself: see `load_model`."""

    name: str
    dtype: torch.dtype

    def load(self):
        """A handle of the model."""
        # Imported only here: a handle that was sent may not need transformers.
        from ..huggingface.adapt import adapt
        from ..llama import load_model

        return adapt(load_model(self.name, self.dtype)[0])


class Introduction(NamedTuple):
    """An actor's report that it is ready.

    Attributes:
        node: id of Ray's node.
        process: id of the process.
        sizes: of its model.
        isa: the instruction set that the kernels use there.
    """

    node: str
    process: int
    sizes: Sizes
    isa: str


class PrefillActor:
    """Computes prompts in a process of Ray's.

    Args:
        model: what to load.
        threads: CPU threads of a forward.
    """

    def __init__(self, model: SavedModel | NamedModel, threads: int):
        torch.set_num_threads(threads)
        self._model = model.load()

    def introduce(self) -> Introduction:
        """Answers once the model is loaded."""
        # Imported only here: `prefill.ray` explains what to do if ray is missing.
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Introduction(node, os.getpid(), Sizes.of(self._model), used_isa())

    def compute(self, prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[Any, Any]], Any]:
        """`Prefilled` as arrays: bytes of every prompt's key and value, and the logits."""
        rows, logits = compute(self._model, prompts)
        return [(_to_bytes(key), _to_bytes(value)) for key, value in rows], logits.numpy()


def used_isa() -> str:
    """The instruction set of this process's kernels."""
    return baton_kernels.build_info()["cpu"]["isa_used"]


def unpack(answer: tuple[list[tuple[Any, Any]], Any], dtype: torch.dtype) -> Prefilled:
    """The result of `PrefillActor.compute`, in the read-only memory in which it arrived."""
    rows, logits = answer
    # Through DLPack, because torch.from_numpy warns about read-only memory.
    tensor = torch.from_dlpack
    return Prefilled(
        [(tensor(key).view(dtype), tensor(value).view(dtype)) for key, value in rows],
        tensor(logits),
    )


def _to_bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()
