"""Stands in for a module's parameter whose values are packed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

# Functions that return properties of a tensor without reading it, besides attributes.
_QUESTIONS = frozenset(
    (
        *("dim", "size", "stride", "numel", "nelement", "element_size", "storage_offset"),
        *("is_floating_point", "is_complex", "is_contiguous", "is_inference", "data_ptr"),
        *("untyped_storage", "requires_grad_", "__hash__", "__len__", "__set__"),
    )
)
# Attributes that are views of the values.
_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag"])
_GONE = (
    "PatchedLlama: this weight was rounded to int8 for the patched pass, and its own values are "
    "gone, also after undo; load the model again, or patch with keep_parameters=True"
)


class PackedParameter(nn.Parameter):
    """A parameter without memory: it has a shape, dtype and device, and unpacks its values anew for
    every reader.

    So `state_dict`, copies and pickles get the exact bits; copies and pickles are plain parameters.
    Writing is refused, because nothing would read it. `module.to` and similar functions give it
    real values, which it then holds. If the weight was rounded, the values are lost, and reading is
    refused too, from then on.
    """

    unpack: Callable[[], torch.Tensor] | None
    rows: Callable[[torch.Tensor], torch.Tensor] | None

    @staticmethod
    def of(
        parameter: torch.Tensor,
        unpack: Callable[[], torch.Tensor] | None,
        rows: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> PackedParameter:
        """The stand-in for a parameter.

        Args:
            parameter: the parameter to replace.
            unpack: returns its values in separate memory; None if they are lost.
            rows: returns the rows `[n, in_features]` that int32 or int64 indices `[n]` select; None
                if the values are lost.
        """
        # One element that every index maps to.
        nothing = parameter.data.new_empty(1).expand(parameter.shape)
        made = PackedParameter(nothing, parameter.requires_grad)
        made.unpack, made.rows = unpack, rows
        return made

    @property
    def is_packed(self) -> bool:
        """Whether it is still a stand-in, i.e. has not been given real values."""
        return self.untyped_storage().nbytes() == self.element_size()

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # An embedding reads few rows, so only these are unpacked.
        if function is nn.functional.embedding and kwargs.get("max_norm") is None:
            indices, weight = args[:2]
            # A compiler cannot trace `is_packed`, and a model does not change while it compiles.
            if isinstance(weight, cls) and (torch.compiler.is_compiling() or weight.is_packed):
                if weight.rows is None:
                    raise RuntimeError(_GONE)
                return weight.rows(indices.reshape(-1)).view(*indices.shape, weight.shape[1])
        name = getattr(function, "__name__", "")
        attribute = ""
        if name == "__get__":
            attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if attribute in _VIEWS or (attribute == "" and name not in _QUESTIONS):
            if name.endswith("_") and not name.endswith("__") or name == "__setitem__":
                _refuse(args[0])
            args, kwargs = tree_map(_read, (args, kwargs))
        elif attribute == "data":
            _refuse(args[0])
        return super().__torch_function__(function, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(_read(self).detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return nn.Parameter, (_read(self).detach(), self.requires_grad)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def check_values(model: object) -> None:
    """Rejects a model whose parameters have lost their values.

    Args:
        model: anything; only a module has parameters.

    Raises:
        RuntimeError: a weight was rounded by an earlier patch.
    """
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if isinstance(parameter, PackedParameter) and parameter.unpack is None:
                raise RuntimeError(_GONE)


def _read(value: Any) -> Any:
    """The values of a packed parameter; anything else unchanged."""
    if isinstance(value, PackedParameter) and value.is_packed:
        if value.unpack is None:
            raise RuntimeError(_GONE)
        return value.unpack()
    return value


def _refuse(parameter: object) -> None:
    if isinstance(parameter, PackedParameter) and parameter.is_packed:
        if parameter.unpack is None:
            raise RuntimeError(_GONE)
        raise RuntimeError(
            "PatchedLlama: a weight of the model cannot be written while it is packed; undo the "
            "patch (or what accelerate returned), or patch with keep_parameters=True"
        )
