"""The CUDA library next to torch, as far as a machine without a GPU can test it.

Tensors that merely claim to be in a GPU's memory go straight to the CUDA kernels' bindings, which
must reject bad arguments before anything is launched.
"""

import re
import subprocess

import pytest
import torch
from gpus import needs_two_gpus
from op_tables import overload, table
from torch._subclasses.fake_tensor import FakeTensorMode

import baton_kernels
from baton_kernels import _library, triton
from baton_kernels.info import has_native_cuda
from baton_kernels.testing import assert_same_bits
from emulation.tools import tool

ALL = baton_kernels.ops.__all__
NATIVE = ("append_kv", "extract_kv", "insert_kv", "merge_attention", "move_kv", "ragged_attention")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
needs_library = pytest.mark.skipif(
    _library.cuda is None,
    reason=f"needs the CUDA library, as in `make test-cuda-build`: {_library.why_no_cuda}",
)
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without a GPU; there is one"
)


class ClaimsCuda(torch.Tensor):
    """Has the shape, strides and dtype of a tensor, claims to be on cuda:0, and has no memory."""

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
    """The op's CUDA kernel itself, for any arguments."""
    return overload(op, arguments).redispatch(CUDA, **arguments)


# The library.


@needs_library
@pytest.mark.parametrize("op", ALL)
def test_every_op_has_a_kernel_for_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"baton_kernels::{op}", "CUDA")
    assert has_native_cuda(op) == (op in NATIVE)
    # Triton gives way only on NVIDIA.
    assert triton.registered_devices(op) == (("xpu",) if op in NATIVE else ("cuda", "xpu"))


@needs_library
def test_build_info_says_what_is_compiled():
    info = baton_kernels.build_info()
    assert info["cuda"]["why_not"] is None
    assert info["cuda"]["toolkit"].startswith("13.")
    assert {op for op in ALL if info["ops"][op]["cuda"] == "yes"} == set(NATIVE)

    def compiled(kind):
        command = [tool("cuobjdump"), f"--list-{kind}", str(_library.cuda)]
        return set(re.findall(r"\.(sm_\d+)\.", subprocess.check_output(command, text=True)))

    architectures = info["cuda"]["architectures"]
    assert compiled("elf") == set(architectures)
    assert compiled("ptx") == {architectures[-1]}


@needs_library
def test_no_kernel_spills_on_any_architecture():
    """A spilled register and an array that is not in registers are both in the stack's frame."""
    command = [tool("cuobjdump"), "-res-usage", str(_library.cuda)]
    architecture, kernels = None, {}
    for line in subprocess.check_output(command, text=True).splitlines():
        if found := re.search(r"arch = (sm_\d+a?)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"\bREG:(\d+) STACK:(\d+) .*\bLOCAL:(\d+)", line):
            kernels[architecture, name] = tuple(map(int, found.groups()))
    architectures = baton_kernels.build_info()["cuda"]["architectures"]
    of_one = {key for key in kernels if key[0] == "sm_90a"}
    assert len(of_one) == (2 if "sm_90" in architectures else 0)
    names = {name for _, name in kernels.keys() - of_one}
    assert kernels.keys() - of_one == {(each, name) for each in architectures for name in names}
    assert sum("attention" in name or "decode" in name for name in names) > 20
    for (architecture, name), (registers, stack, local) in kernels.items():
        assert registers > 0 and stack == local == 0, (architecture, name)


# Calls.


@needs_library
@pytest.mark.parametrize("op", ALL)
def test_fake_and_meta_tensors(op):
    """Fake tensors, as in torch.compile, give results on the device with the CPU's shapes."""
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


@needs_library
def test_an_unknown_prefill_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("BATON_PREFILL", "fast")
    arguments = {name: ClaimsCuda.of(x) for name, x in table("ragged_attention")[1]().items()}
    with pytest.raises(ValueError, match="BATON_PREFILL must be mma, mma32 or wgmma, got fast"):
        call_cuda("ragged_attention", arguments)


# Loading, on any machine.


def load_cuda(monkeypatch, cuda, library, error=None):
    """The result of _library for a torch with this CUDA version and this CUDA library."""

    def load_library(path):
        assert path == str(library)
        if error:
            raise error

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_library, "_file", lambda name: library)
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    return _library._load_cuda()


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "library.so"
    path.touch()
    return path


def test_torch_without_cuda_loads_no_cuda_library(monkeypatch, library):
    assert load_cuda(monkeypatch, None, library) == (None, "this torch has no CUDA")


def test_a_build_without_cuda_says_so(monkeypatch, tmp_path):
    loaded, reason = load_cuda(monkeypatch, "13.0", tmp_path / "nowhere.so")
    assert loaded is None and "BATON_CUDA=1" in reason


def test_a_cuda_library_is_loaded(monkeypatch, library):
    assert load_cuda(monkeypatch, "13.0", library) == (library, None)


def test_a_library_that_does_not_load_is_no_secret(monkeypatch, library):
    with pytest.warns(UserWarning, match="libtorch_cuda.so is missing.*Triton kernels take over"):
        loaded, reason = load_cuda(
            monkeypatch, "13.0", library, OSError("libtorch_cuda.so is missing")
        )
    assert loaded is None and "libtorch_cuda.so is missing" in reason


@pytest.mark.skipif(
    _library.cuda is not None, reason="needs a build without the CUDA library, as in `make test`"
)
def test_build_info_without_the_cuda_library():
    info = baton_kernels.build_info()
    assert info["cuda"] == {
        "architectures": [], "toolkit": "", "why_not": _library.why_no_cuda,
    }  # fmt: skip
    assert {where["cuda"] for where in info["ops"].values()} == {f"no: {_library.why_no_cuda}"}
    with pytest.raises(NotImplementedError):  # the schema is there, the library is not
        torch.ops.baton_kernels.cuda_build()


# On GPUs.


@needs_two_gpus
@pytest.mark.parametrize("op", NATIVE)
def test_gpu_call_runs_on_the_device_of_its_tensors(op):
    """Not the current device: torch's CUDA runtime and the library's each have their own."""
    arguments = table(op)[1]()
    results = []
    for device in ("cuda:0", "cuda:1"):
        moved = {
            name: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        result = getattr(baton_kernels, op)(**moved)
        written = [x.cpu() for x in moved.values() if isinstance(x, torch.Tensor)]
        made = result if isinstance(result, tuple) else (result,)
        results.append([*written, *(x.cpu() for x in made if x is not None)])
        assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        assert_same_bits(second, first, op)
