"""Checks of arguments by shape and dtype, with the documented error classes.

An op's fake implementation runs them. Its Python function runs them when the C++ checks have
rejected a call, because C++ can only raise ValueError. So one place decides between TypeError,
ValueError and NotImplementedError, and a correct call pays for the C++ checks only.

Index values are the contents of tensors; only C++ checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, is_grad_enabled

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Dtypes of caches whose tokens have scales, and the value to which the largest magnitude of a token
# and head is mapped.
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Bytes of the scale that follows the elements of a token that is extracted unconverted.
SCALE_BYTES = 4
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 16, 256, 8


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, last dimension]; a view if its strides allow one."""
    if x.dim() == 2 or x.dim() == 0:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def count_rows(*indices: torch.Tensor | None, otherwise: int) -> int:
    """The number of rows in a call: the length of the first index argument that is given."""
    return next((tensor.numel() for tensor in indices if tensor is not None), otherwise)


def count_packed_rows(
    slots: torch.Tensor | None,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    total_tokens: int,
) -> int:
    """The same for packed tokens; if no argument says otherwise, there is one token per row."""
    rows = total_tokens if cu_seqlens is None else max(cu_seqlens.numel() - 1, 0)
    return count_rows(slots, starts, otherwise=rows)


def default_slots(slots: torch.Tensor | None, rows: int, device: torch.device) -> torch.Tensor:
    """The given slots; by default row i is in slot i."""
    return torch.arange(rows, dtype=torch.int32, device=device) if slots is None else slots


def default_starts(starts: torch.Tensor | None, rows: int, device: torch.device) -> torch.Tensor:
    """The given starts; by default all rows begin in column 0."""
    return torch.zeros(rows, dtype=torch.int32, device=device) if starts is None else starts


def default_cu_seqlens(
    cu_seqlens: torch.Tensor | None, rows: int, device: torch.device
) -> torch.Tensor:
    """The given boundaries; by default each row has one token."""
    return default_slots(cu_seqlens, rows + 1, device)


def call(op: str, native: Callable[..., Any], check: Callable[..., object], *args):
    """Calls the native op; if it rejects the call, raises the documented error.

    Args:
        op: Name of the op, with which errors begin.
        native: The overload of torch.ops.
        check: The op's checks by shape and dtype; raises the documented error.
        args: Arguments of both, by position: torch needs half a microsecond for each keyword.

    Raises:
        ValueError, TypeError, NotImplementedError: As `check` decides, else what the op raised.
        NotImplementedError: A tensor requires grad and gradients are on; there is no backward.
    """
    if is_grad_enabled():
        for argument in args:
            if isinstance(argument, Tensor) and argument.requires_grad:
                raise NotImplementedError(
                    f"{op}: tensors must not require grad, got one that does: there is no "
                    "backward, call it under torch.inference_mode() or torch.no_grad()"
                )
    try:
        return native(*args)
    except (ValueError, RuntimeError) as error:
        check(*args)
        # Shapes and dtypes are right: an index value is wrong, or the failure is not the caller's.
        if isinstance(error, ValueError):
            raise ValueError(str(error)) from None
        raise


class Checker:
    """Checks of one op's arguments; every failure names the op and the argument."""

    def __init__(self, op: str):
        self.op = op

    def fail(self, argument: str, expected: str, actual: object, error=ValueError) -> NoReturn:
        """Raises `<op>: <argument> must be <expected>, got <actual>`."""
        raise error(f"{self.op}: {argument} must be {expected}, got {actual}")

    def tensor(self, name: str, value: object) -> None:
        if not isinstance(value, torch.Tensor):
            self.fail(name, "a tensor", type(value).__name__, TypeError)

    def device(self, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        self.tensor(name, tensor)
        if tensor.device != device:
            self.fail(
                name, f"on the {device.type}, where the other tensors are", str(tensor.device)
            )

    def floating(self, name: str, tensor: torch.Tensor) -> None:
        self.tensor(name, tensor)
        if tensor.dtype not in FLOATS:
            self.fail(name, "float32, float16 or bfloat16", dtype_name(tensor.dtype), TypeError)

    def dtype_as(self, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor):
        self.device(name, tensor, other.device)
        if tensor.dtype != other.dtype:
            self.fail(
                name,
                f"{dtype_name(other.dtype)} as {other_name}",
                dtype_name(tensor.dtype),
                TypeError,
            )

    def float32(self, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        self.device(name, tensor, device)
        if tensor.dtype != torch.float32:
            self.fail(name, "float32", dtype_name(tensor.dtype), TypeError)

    def dims(self, name: str, tensor: torch.Tensor, expected: int) -> None:
        if tensor.dim() != expected:
            self.fail(name, f"a {expected}-D tensor", f"shape {list(tensor.shape)}")

    def shape(self, name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
        if tensor.dim() != len(expected) or any(
            a != b for a, b in zip(tensor.shape, expected, strict=True)
        ):
            self.fail(name, f"of shape {list(expected)}", list(tensor.shape))

    def last_contiguous(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            self.fail(name, "contiguous in its last dimension", f"stride {tensor.stride(-1)}")

    def contiguous(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            self.fail(name, "contiguous", "a strided tensor")

    def not_expanded(self, name: str, tensor: torch.Tensor) -> None:
        # Compares values, so that this also works on strides that a compiler knows as symbols only.
        steps = sorted(
            ((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
             if size > 1),
            key=lambda step: step[0],
        )  # fmt: skip
        extent = 0
        for stride, size in steps:
            if stride <= extent:
                self.fail(name, "without overlapping elements", "overlapping strides")
            extent += stride * (size - 1)

    def index(self, name: str, tensor: torch.Tensor, size: int | None, device: torch.device):
        self.device(name, tensor, device)
        if tensor.dtype != torch.int32:
            self.fail(name, "int32", dtype_name(tensor.dtype), TypeError)
        self.dims(name, tensor, 1)
        if size is not None:
            self.shape(name, tensor, [size])
        self.contiguous(name, tensor)

    def index_or_none(
        self, name: str, tensor: torch.Tensor | None, size: int, device: torch.device
    ) -> None:
        """An index argument that may be left out."""
        if tensor is not None:
            self.index(name, tensor, size, device)

    def index_rows(self, name: str, tensor: torch.Tensor, rows: int, device: torch.device):
        """An int32 matrix with any number of columns, each row contiguous."""
        self.device(name, tensor, device)
        if tensor.dtype != torch.int32:
            self.fail(name, "int32", dtype_name(tensor.dtype), TypeError)
        self.dims(name, tensor, 2)
        self.shape(name, tensor, [rows, tensor.shape[1]])
        self.last_contiguous(name, tensor)

    def cu_seqlens(
        self, name: str, tensor: torch.Tensor | None, rows: int, total: int, device: torch.device
    ) -> None:
        """Boundaries of the rows' tokens; if left out, every row has one token."""
        if tensor is not None:
            self.index(name, tensor, rows + 1, device)
        elif total != rows:
            expected = "given unless every row has one token"
            self.fail(name, expected, f"None with {total} tokens in {rows} rows")

    def caches(
        self, key_cache, value_cache, *, with_layers: bool, written: bool, key_scale=None,
        value_scale=None,
    ) -> None:  # fmt: skip
        """With both scales the caches have an eight-bit type, else a float type."""
        self.tensor("key_cache", key_cache)
        if (key_scale is None) != (value_scale is None):
            given = "only key_scale" if value_scale is None else "only value_scale"
            self.fail("key_scale and value_scale", "given together", given)
        dtype = dtype_name(key_cache.dtype)
        if key_scale is None and key_cache.dtype in EIGHT_BITS:
            expected = f"given with a cache of {dtype}"
            self.fail("key_scale and value_scale", expected, "None", TypeError)
        if key_scale is None:
            self.floating("key_cache", key_cache)
        elif key_cache.dtype not in EIGHT_BITS:
            expected = "int8 or float8_e4m3fn with key_scale and value_scale"
            self.fail("key_cache", expected, dtype, TypeError)
        self.dtype_as("value_cache", value_cache, "key_cache", key_cache)
        if key_cache.dim() != 4 and not (with_layers and key_cache.dim() == 5):
            layout = "[num_slots, num_kv_heads, capacity, head_dim]"
            if with_layers:
                layout += " with an optional leading num_layers"
            self.fail("key_cache", layout, f"shape {list(key_cache.shape)}")
        self.shape("value_cache", value_cache, key_cache.shape)
        self.last_contiguous("key_cache", key_cache)
        self.last_contiguous("value_cache", value_cache)
        head_dim = key_cache.shape[-1]
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
            self.fail(
                "head_dim",
                f"a multiple of {HEAD_DIM_MULTIPLE} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}",
                head_dim,
                NotImplementedError,
            )
        if key_cache.shape[-3] < 1:
            self.fail("num_kv_heads", "at least 1", key_cache.shape[-3])
        if written:
            self.not_expanded("key_cache", key_cache)
            self.not_expanded("value_cache", value_cache)
        if key_scale is None:
            return
        for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
            self.float32(name, scale, key_cache.device)
            self.shape(name, scale, key_cache.shape[:-1])
            if written:
                self.not_expanded(name, scale)
        if key_cache.device.type not in ("cpu", "meta"):
            expected = "of float32, float16 or bfloat16 (eight bits need the CPU's kernels)"
            self.fail("key_cache", expected, dtype, NotImplementedError)

    def tokens(self, name: str, tensor: torch.Tensor, key_cache: torch.Tensor) -> None:
        """Packed keys or values [(num_layers,) total_tokens, num_kv_heads, head_dim].

        For an eight-bit cache they are floats, or stored elements with their scales.
        """
        *layers, _, num_kv_heads, _, head_dim = key_cache.shape
        self.tensor(name, tensor)
        if key_cache.dtype not in EIGHT_BITS:
            self.dtype_as(name, tensor, "key_cache", key_cache)
        else:
            self.device(name, tensor, key_cache.device)
            if tensor.dtype == key_cache.dtype:
                head_dim += SCALE_BYTES
            else:
                self.floating(name, tensor)
        self.dims(name, tensor, key_cache.dim() - 1)
        self.shape(name, tensor, [*layers, tensor.shape[-3], num_kv_heads, head_dim])
        self.last_contiguous(name, tensor)
