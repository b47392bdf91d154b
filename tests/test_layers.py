"""The layers of the package: who may import what, and that every op is in every layer."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from op_tables import schemas

import baton_kernels
from baton_kernels import reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "baton_kernels"
OPS = sorted(reference.__all__)
MAX_LINES = 450
SOURCES = sorted(
    path
    for folder in ("baton_kernels", "python", "csrc", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
)


def imports(path):
    """Modules that a file imports, relative ones by their full name."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            prefix = ".".join(above) if node.level else ""
            module = ".".join(filter(None, (prefix, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_kernels_import_no_model_and_no_engine():
    foreign = {"transformers", "baton_engines", "vllm", "sglang", "accelerate", "kernels"}
    for path in PACKAGE.rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path)} & foreign
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_importing_kernels_loads_no_model_and_no_engine():
    code = (
        "import sys, baton_kernels, baton_kernels.testing\n"
        "foreign = {'transformers', 'baton_engines', 'vllm', 'sglang'}\n"
        "print(sorted(foreign & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reference_imports_torch_alone():
    for path in (PACKAGE / "reference").glob("*.py"):
        for name in imports(path):
            own = path.name == "__init__.py" and name.startswith("baton_kernels.reference.")
            assert own or name.split(".")[0] == "torch", f"{path.name} imports {name}"


@pytest.mark.parametrize("folder", ["common", "cpu", "cuda"])
def test_core_includes_no_torch(folder):
    for path in (ROOT / "csrc" / folder).rglob("*"):
        if path.is_file():
            for included in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text()):
                assert not re.match(r"(torch|ATen|c10|pybind11)\b", included), f"{path}: {included}"


def test_common_includes_no_cuda_runtime():
    for path in (ROOT / "csrc" / "common").rglob("*"):
        if path.is_file():
            assert not re.search(r'#\s*include\s*[<"]cuda', path.read_text()), path


@pytest.mark.parametrize("op", OPS)
def test_op_is_in_every_layer(op):
    """An op with many files has a folder in a layer."""
    for pattern in (
        f"csrc/common/{op}.h",
        f"csrc/cpu/**/{op}.cpp",
        f"csrc/bindings/{op}.cpp",
        f"baton_kernels/ops/{op}.py",
        f"baton_kernels/reference/{op}.py",
        f"tests/ops/test_{op}.py",
    ):
        assert len(list(ROOT.glob(pattern))) == 1, pattern


def test_a_part_of_an_op_is_found_by_its_name():
    """`git ls-files '*<op>*'` prints an op from its interface to the code of each device.

    What lies beside the ops' files in csrc begins with the name of its op, or holds all of them
    together; helpers of several ops have folders of their own.
    """
    common = {"kernels.h", "kernel_table.cpp"}
    for folder in ("cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).glob("*.*"):
            assert path.name in common or path.name.startswith(tuple(OPS)), path


def test_cuda_kernels_are_bound():
    """An op with a CUDA kernel has a binding of it, which shares the checks of the CPU's."""

    def names(folder, suffix):
        return {path.stem for path in (ROOT / "csrc" / folder).rglob(f"*{suffix}")} & set(OPS)

    assert (
        names("cuda", ".cu") == names("bindings/cuda", ".cpp") == names("bindings", ".h") != set()
    )


def test_every_layer_has_these_ops_alone():
    found = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")}
    assert found - set(OPS) <= {"checks"}, found - set(OPS)
    assert {path.stem for path in (PACKAGE / "reference").glob("[!_]*.py")} == set(OPS)


def has_out(op):
    """Whether results can be written into tensors that are there: torch's overload `out`."""
    return "out" in getattr(torch.ops.baton_kernels, op).overloads()


# Arguments of a Python function that choose an overload, whose schema then has them not.
CHOICES = {"out": "out", "return_lse": "lse"}


@pytest.mark.parametrize("op", OPS)
def test_signatures_agree(op):
    """The Python function, the reference and the schemas name the same arguments in one order."""
    function = inspect.signature(getattr(baton_kernels, op)).parameters
    definition = inspect.signature(getattr(reference, op)).parameters
    assert [(p.name, p.kind, p.default) for p in function.values()] == [
        (p.name, p.kind, p.default) for p in definition.values()
    ]
    overloads = getattr(torch.ops.baton_kernels, op).overloads()
    for choice, overload in CHOICES.items():
        assert (choice in function) == (overload in overloads)
    names = [name for name in function if name not in CHOICES]
    taken = [[argument.name for argument in schema.arguments] for schema in schemas(op).values()]
    assert names in taken
    for own in taken:
        assert own == [name for name in names if name in own]


def documented_arguments(op):
    """The entries of the section Args: name to text."""
    text = inspect.cleandoc(getattr(baton_kernels, op).__doc__)
    section = re.search(r"^Args:\n((?:(?:[ ]{4,}.*)?\n)+)", text + "\n", re.MULTILINE)
    assert section, f"{op} has no section Args"
    entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.MULTILINE)[1:]
    described = {}
    for entry in entries:
        names, _, rest = entry.partition(":")
        for name in re.sub(r"\(.*\)", "", names).split(","):
            described[name.strip(" `*")] = rest
    return described


@pytest.mark.parametrize("op", OPS)
def test_docstring_names_the_arguments(op):
    described = documented_arguments(op)
    assert list(described) == list(inspect.signature(getattr(baton_kernels, op)).parameters)


@pytest.mark.parametrize("op", OPS)
def test_docstring_marks_what_is_written(op):
    written = {
        argument.name
        for schema in schemas(op).values()
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    if has_out(op):
        written.add("out")
    marked = {name for name, text in documented_arguments(op).items() if "Written." in text}
    assert marked == written


@pytest.mark.parametrize("op", OPS)
def test_docstring_sections(op):
    """In the order of the style guide: formula, Args, Raises, Source."""
    text = inspect.cleandoc(getattr(baton_kernels, op).__doc__)
    places = [text.find(f"\n{section}:") for section in ("Args", "Raises", "Source")]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_length_of_files(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines"
