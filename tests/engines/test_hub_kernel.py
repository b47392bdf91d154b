"""The folder that `scripts/hub_kernel.py` writes, as used by `kernels` and transformers.

transformers 5.23 and 5.24 require kernels >= 0.18.2, but the newest on PyPI in November 2026 is
0.17.2, whose interface is the same as far as they use it. So the program below, in a separate
process, tells them the version that they require.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "hub_kernel.py"
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None,
    reason="needs the package kernels, which `make test-engines` installs",
)
# Continuous batching of four prompts; eager attention answers them one by one first.
PROGRAM = """
import importlib.metadata
import sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.18.2" if name == "kernels" else real(name)
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from baton_engines.testing.small_llama import small_llama
model = small_llama(max_position_embeddings=256)
prompts = [[3, 5, 7], [11] * 20, list(range(1, 60)), [2]]
config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
model.set_attn_implementation("eager")
want = []
for prompt in prompts:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    want.append(out[0, len(prompt) :].tolist())
model.set_attn_implementation("baton/flash", allow_all_kernels=True)
(flash,) = (
    module for name, module in sys.modules.items()
    if name.startswith(sys.argv[1]) and name.endswith(".flash")
)
calls, inner = [], flash.ragged_attention
flash.ragged_attention = lambda *args, **options: calls.append(1) or inner(*args, **options)
outputs = model.generate_batch(
    prompts,
    generation_config=config,
    continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
    progress_bar=False,
)
names = sorted(outputs, key=lambda name: int(name.split("_")[-1]))
assert [outputs[name].generated_tokens for name in names] == want
assert len(calls) >= 12 * model.config.num_hidden_layers, len(calls)
print("same answers")
"""


@pytest.fixture
def folder(tmp_path):
    subprocess.run([sys.executable, SCRIPT, tmp_path / "hub"], check=True)
    return tmp_path / "hub"


def test_the_folder_is_complete(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    variant = "build/torch-cpu/"
    assert files == {"build.toml", f"{variant}__init__.py", f"{variant}metadata.json"}
    metadata = json.loads((folder / variant / "metadata.json").read_text())
    assert metadata["name"] == "baton-flash" and metadata["backend"] == {"type": "cpu"}


@needs_kernels
def test_kernels_reads_the_folder(folder):
    from kernels import get_local_kernel
    from kernels._rust import Build

    Build.open(str(folder))
    kernel = get_local_kernel(folder)
    assert kernel.flash_attn_varlen_func.__module__ == "baton_kernels.flash"
    toml = folder / "build.toml"
    toml.write_text(toml.read_text().replace("baton-flash", "baton_flash"))
    with pytest.raises(ValueError, match="name"):
        Build.open(str(folder))


def batch_continuously(folder, package):
    """Runs the program with the folder, whose functions are a package's of this name."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, package],
        env={**os.environ, "LOCAL_KERNELS": f"baton/flash={folder}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "same answers"


@needs_kernels
def test_continuous_batching_gives_eager_s_answers(folder):
    batch_continuously(folder, "baton_kernels")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder with a compiled library; compiling takes minutes."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, SCRIPT, folder, "--compiled"], check=True)
    return folder


@needs_kernels
def test_the_compiled_variant_needs_nothing_else(compiled):
    """A copy of the package whose names are its own: ops, modules, library."""
    from kernels import get_local_kernel
    from kernels._rust import Build

    import baton_kernels

    Build.open(str(compiled))
    (library,) = compiled.rglob("*.so")
    package = library.parent.name
    assert re.fullmatch(r"torch-stable-abi210-cpu-\w+-linux", library.parent.parent.name)
    metadata = json.loads((library.parent.parent / "metadata.json").read_text())
    assert metadata["id"] == package.replace("kernels", "flash")
    sources = "".join(path.read_text() for path in compiled.rglob("*.py"))
    assert not re.search(r"\bbaton_kernels\b", sources)
    kernel = get_local_kernel(compiled)
    assert kernel.flash_attn_func.__module__ == f"{package}.flash"
    assert getattr(torch.ops, package).ragged_attention is not None
    q, k, v = torch.randn(3, 2, 9, 4, 64)
    want = baton_kernels.flash.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(kernel.flash_attn_func(q, k, v, causal=True), want)


@needs_kernels
def test_continuous_batching_on_the_compiled_variant(compiled):
    batch_continuously(compiled, "_baton_kernels_cpu_")


@pytest.mark.skipif(
    importlib.util.find_spec("kernel_abi_check") is None,
    reason="needs the package kernel-abi-check, which `make test-engines` installs",
)
@pytest.mark.parametrize("variant", ["installed", "compiled"])
def test_the_library_keeps_to_the_abi_of_hub_kernels(variant, request):
    """The ABI of manylinux_2_28, and none of Python's."""
    from kernel_abi_check import ObjectFile

    import baton_kernels._library as library

    path = library.cpu
    if variant == "compiled":
        (path,) = request.getfixturevalue("compiled").rglob("*.so")
    found = ObjectFile(str(path))
    assert found.check_manylinux("manylinux_2_28") == []
    assert found.check_python_abi("3.9") == []
