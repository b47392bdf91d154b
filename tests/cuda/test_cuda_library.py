"""The CUDA library beside torch, as far as a machine without a GPU can show it.

Tensors that only say they are in a GPU's memory go straight to the CUDA kernels' bindings: what
these refuse, they refuse before anything is launched.
"""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from op_tables import overload, table
from torch._subclasses.fake_tensor import FakeTensorMode

import baton_kernels
from baton_kernels import _library, triton
from baton_kernels.info import has_native_cuda
from emulation.tools import tool

ALL = baton_kernels.ops.__all__
NATIVE = ("append_kv", "extract_kv", "insert_kv", "merge_attention", "move_kv", "ragged_attention")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
needs_library = pytest.mark.skipif(_library.cuda is None, reason=f"{_library.why_no_cuda}")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about having no GPU")


class ClaimsCuda(torch.Tensor):
    """Shape, strides and dtype of a tensor, on cuda:0 by its own word, with no memory at all."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a tensor without memory")

    @staticmethod
    def of(x):
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            return x
        return torch.Tensor._make_wrapper_subclass(
            ClaimsCuda, x.shape, strides=x.stride(), dtype=x.dtype, device="cuda:0"
        )


def call_cuda(op, arguments):
    """The op's CUDA kernel itself, whatever its arguments are."""
    return overload(op, arguments).redispatch(CUDA, **arguments)


# The library.


@needs_library
@pytest.mark.parametrize("op", ALL)
def test_every_op_has_a_kernel_for_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"baton_kernels::{op}", "CUDA")
    assert has_native_cuda(op) == (op in NATIVE)
    # Triton gives way on NVIDIA alone.
    assert triton.registered_devices(op) == (("xpu",) if op in NATIVE else ("cuda", "xpu"))


@needs_library
def test_build_info_says_what_is_compiled():
    info = baton_kernels.build_info()
    assert info["cuda"]["why_not"] is None
    assert info["cuda"]["toolkit"].startswith("13.")
    assert {op for op in ALL if info["ops"][op]["cuda"] == "yes"} == set(NATIVE)
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")

    def compiled(kind):
        command = [cuobjdump, f"--list-{kind}", _library.cuda.__file__]
        return set(re.findall(r"\.(sm_\d+)\.", subprocess.check_output(command, text=True)))

    architectures = info["cuda"]["architectures"]
    assert compiled("elf") == set(architectures)
    assert compiled("ptx") == {architectures[-1]}


@needs_library
def test_it_needs_no_torch_of_a_later_version():
    """The stable ABI: no C++ symbol of torch is asked for."""
    library = Path(_library.cuda.__file__)
    assert library.name.endswith(".abi3.so")
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    assert not re.findall(r"_ZN\w*(?:c10|at|torch)\d\w*", symbols)


# Calls.


@needs_library
@pytest.mark.parametrize("op", ALL)
def test_fake_and_meta_tensors(op):
    """What torch.compile traces: results on the device, of the shape that the CPU gives."""
    arguments = table(op)[1]()

    def flat(results):
        return [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]

    def on(device, make):
        moved = {
            name: make(x, device) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        return flat(getattr(baton_kernels, op)(**moved))

    def strided(x, device):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    with FakeTensorMode():
        fake = on("cuda:0", strided)
    meta = on("meta", strided)
    expected = on("cpu", lambda x, _: x)
    for got, where in ((fake, "cuda"), (meta, "meta")):
        assert [(x.device.type, x.shape, x.dtype) for x in got] == [
            (where, x.shape, x.dtype) for x in expected
        ]


REFUSALS = [
    pytest.param(op, refusal, id=f"{op}-{name}")
    for op in NATIVE
    for name, refusal in table(op)[0].items()
    if "fake" in refusal.routes  # not those about index values, which no host looks at
]


@needs_library
@pytest.mark.parametrize(("op", "refusal"), REFUSALS)
def test_bad_arguments(op, refusal):
    arguments = table(op)[1]()
    for name, change in refusal.changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ValueError, match=rf"{op}: ({refusal.argument}) must be .+, got .+"):
        call_cuda(op, {name: ClaimsCuda.of(x) for name, x in arguments.items()})


@needs_library
@pytest.mark.parametrize("op", NATIVE)
def test_a_tensor_on_the_cpu_is_refused(op):
    arguments = table(op)[1]()
    tensors = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    for name in tensors:
        mixed = {n: x if n == name else ClaimsCuda.of(x) for n, x in arguments.items()}
        with pytest.raises(ValueError, match=rf"{op}: \w+ must be on the cuda device .*, got"):
            call_cuda(op, mixed)


@needs_library
@needs_no_gpu
@pytest.mark.parametrize("op", NATIVE)
def test_without_a_gpu_a_call_says_so(op):
    arguments = {name: ClaimsCuda.of(x) for name, x in table(op)[1]().items()}
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error \d+ \(cudaError\w+\): .+"):
        call_cuda(op, arguments)


# Loading, on any machine.


def load(monkeypatch, cuda, found, error=None):
    """What _library makes of a torch with this CUDA version beside this CUDA library."""
    module = types.ModuleType("baton_kernels._C_cuda")

    def import_module(name):
        if error:
            raise error
        return module

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(_library.importlib, "import_module", import_module)
    library, reason = _library._load_cuda()
    assert library is None or library is module
    return library, reason


def test_torch_without_cuda_loads_no_cuda_library(monkeypatch):
    assert load(monkeypatch, None, object()) == (None, "this torch has no CUDA")


def test_a_build_without_cuda_says_so(monkeypatch):
    library, reason = load(monkeypatch, "13.0", None)
    assert library is None and "BATON_CUDA=1" in reason


def test_a_cuda_library_is_loaded(monkeypatch):
    library, reason = load(monkeypatch, "13.0", object())
    assert library is not None and reason is None


def test_a_library_that_does_not_load_is_no_secret(monkeypatch):
    with pytest.warns(UserWarning, match="libtorch_cuda.so is missing.*Triton kernels take over"):
        library, reason = load(
            monkeypatch, "13.0", object(), ImportError("libtorch_cuda.so is missing")
        )
    assert library is None and "libtorch_cuda.so is missing" in reason


@pytest.mark.skipif(_library.cuda is not None, reason="is about having no CUDA library")
def test_build_info_without_the_cuda_library():
    info = baton_kernels.build_info()
    assert info["cuda"] == {
        "architectures": [], "toolkit": "", "why_not": _library.why_no_cuda,
    }  # fmt: skip
    assert {where["cuda"] for where in info["ops"].values()} == {f"no: {_library.why_no_cuda}"}
    code = "import baton_kernels, sys; print('baton_kernels._C_cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
