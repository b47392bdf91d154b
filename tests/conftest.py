"""Fixtures for all tests: the backends on which an op's tests run."""

import atexit
import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import baton_kernels
from baton_kernels.testing import available_cpu_isas, cpu_isa

# Modules that tests share: relay_checks, op_tables, device_ops and others.
sys.path.append(str(Path(__file__).parent / "support"))
import judged
import quick
import turns
from device_ops import DeviceOps

from emulation import amx, build
from emulation.cuda.backends import EMULATED, EmulatedOps

# Until everything is collected: see pytest_collection_finish.
gc.disable()


@dataclasses.dataclass(frozen=True)
class Backend:
    """A namespace with every op as an attribute, and a context to enter while using it."""

    name: str
    ops: object
    enter: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def has(self, op: str) -> bool:
        """Whether it can run the tests of this op; emulators have only the ops written for them."""
        return not isinstance(self.ops, (EmulatedOps, amx.AmxOps)) or hasattr(self.ops, op)


BACKENDS = [
    Backend(f"cpu-{isa}", baton_kernels, lambda isa=isa: cpu_isa(isa))
    for isa in available_cpu_isas()
]
# Next to an installed wheel there are no sources to emulate.
if build.KERNELS:
    BACKENDS += [Backend(name, ops, ops.entered) for name, ops in EMULATED.items()]
if amx.can_be_emulated():
    BACKENDS.append(Backend("cpu-amx_bf16-emulated", amx.AmxOps(), amx.entered))
if torch.cuda.is_available():
    BACKENDS.append(Backend("cuda", DeviceOps("cuda")))
    # For ops with a CUDA kernel, nothing else would run the Triton kernel on an NVIDIA GPU.
    if torch.version.hip is None and baton_kernels.triton.why_unavailable() is None:
        BACKENDS.append(Backend("triton-cuda", DeviceOps("cuda", baton_kernels.triton)))
# Decided before triton is imported, for the whole process:
# tests/triton/test_triton_interpreter.py starts one with it.
if os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS = [Backend("triton", baton_kernels.triton)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", help="run the tests of ops on one backend (cuda, triton-cuda: a GPU's)"
    )
    parser.addoption("--quick", action="store_true", help="one dtype, one instruction set: minutes")
    parser.addoption("--full", action="store_true", help="every combination of cases: much longer")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: no other test runs at the same time")
    config.addinivalue_line("markers", "slow: left out by --quick")
    config.addinivalue_line("markers", "full(where): left out but by --full; all cases, or some")
    config.addinivalue_line("markers", "long: comes first, so that no process ends with it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--backend leaves out tests of ops that do not run on it; --quick leaves out most tests;
    without --full, combinations of cases that others represent are left out."""
    kept, own = items, f"cpu-{baton_kernels.build_info()['cpu']['isa_used']}"
    if not config.getoption("full"):
        kept = judged.without_repetitions(
            [item for item in items if not judged.is_left_to_full(item)], own
        )
    if config.getoption("quick"):
        kept = quick.chosen(kept, own)
    name = config.getoption("backend")
    if name is not None:
        if name not in (backend.name for backend in BACKENDS):
            known = ", ".join(backend.name for backend in BACKENDS)
            raise pytest.UsageError(f"--backend: must be one of {known}, got {name}")
        kept = [
            item for item in kept
            if getattr(quick.parameters(item).get("ops"), "name", None) == name
        ]  # fmt: skip
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Freezes all objects that exist by now, so that `gc.collect()` need not walk them: that takes
    half a second each time, and tests of memory and all measurements of bench call it."""
    gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # objects that are left then are reported as leaked


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the tests of ``test_<op>.py`` and ``test_<op>_*.py`` on every backend with the op."""
    if "ops" in metafunc.fixturenames:
        name = metafunc.module.__name__.split(".")[-1].removeprefix("test_")
        fits = [op for op in baton_kernels.ops.__all__ if f"{name}_".startswith(f"{op}_")]
        op = max(fits, key=len, default=name)
        # A file about several ops names an op that has all of their backends.
        op = getattr(metafunc.module, "BACKENDS_OF", op)
        # A file can leave backends out, or give the beginning of the names of those that run it.
        left_out = getattr(metafunc.module, "NOT_ON", ())
        only_on = getattr(metafunc.module, "ONLY_ON", "")
        backends = [
            each
            for each in BACKENDS
            if each.has(op) and each.name not in left_out and each.name.startswith(only_on)
        ]
        metafunc.parametrize("ops", backends, ids=lambda backend: backend.name, indirect=True)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Iterator[object]:
    """The ops of one backend: ``ops.insert_kv(...)``."""
    with request.param.enter():
        yield request.param.ops


@pytest.fixture(scope="session")
def every_case(request: pytest.FixtureRequest) -> bool:
    """Whether a test that represents many cases runs all of them."""
    return request.config.getoption("full")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests about threads set their number; the others leave cores to each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets tests of several xdist processes run at the same time, except those marked alone."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    with turns.turn(
        turns.run_folder(request), request.node.get_closest_marker("alone") is not None
    ):
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """For tests that compile: clears what was compiled before them and after them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
