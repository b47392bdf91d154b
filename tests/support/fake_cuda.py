"""A pretended GPU: code for the device "cuda" runs on CPU tensors, as far as torch can tell."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode


class _OnTheCpu(TorchFunctionMode):
    """Tensors that are requested on cuda are created on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(x):
            is_cuda = isinstance(x, (str, torch.device)) and torch.device(x).type == "cuda"
            return "cpu" if is_cuda else x

        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = here(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(map(here, args))
        return func(*args, **kwargs)


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        # The device has not begun yet, as if it had been told to sleep.
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.seconds - self.seconds)


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "no GPU at all")
    monkeypatch.setattr(
        cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 10)
    )
    monkeypatch.setattr(cuda, "Event", _Event)
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(cuda, "empty_cache", lambda: None)
    with _OnTheCpu():
        yield
