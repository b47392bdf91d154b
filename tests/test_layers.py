"""The layers of the package: who may import what, and that every op is in every layer."""

import ast
import importlib.util
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
# The rooms of the engines' package, lowest first: a module imports from its own room and from those
# before it. `testing` is separate: it serves tests and benchmarks, and no room imports it.
ROOMS = (
    "query", "llama", "huggingface", "vllm", "slots", "policies", "prefill", "relay", "invariance",
    "serve", "testing", "cli",
)  # fmt: skip
MAX_LINES = 450
SOURCES = sorted(
    path
    for folder in ("baton_kernels", "python", "csrc", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
)


def load_structure():
    """The command that prints the structure, as a module."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "scripts" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure = load_structure()


def upward_imports(modules):
    """Imports of the engines' package from a higher room, or from `testing`."""
    graph = structure.import_graph(modules)
    rank = {f"baton_engines.{room}": number for number, room in enumerate(ROOMS)}
    rank["baton_engines"] = len(ROOMS)
    for module, targets in graph.items():
        own = structure.room_of(module)
        for room in {structure.room_of(target) for target in targets} - {own}:
            if rank[room] > rank[own] or room == "baton_engines.testing":
                yield f"{module} -> {room}"


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


def test_rooms_of_the_engines_import_downward_only():
    folder = ROOT / "python" / "baton_engines"
    assert {path.parent.name for path in folder.glob("*/__init__.py")} == set(ROOMS)
    modules = structure.find_modules({"baton_engines": folder})
    assert set(modules) > {"baton_engines", "baton_engines.relay.batch"}
    assert list(upward_imports(modules)) == []


def test_an_upward_import_is_found(tmp_path):
    folder = tmp_path / "baton_engines"
    for name, source in {
        "__init__": "",
        "query/__init__": "def f():\n    from ..slots import Slots\n",
        "slots/__init__": "class Slots:\n    pass\n",
        "policies/base": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..testing.fake import Fake\n",
        "relay/batch": "from ..slots import Slots\nimport baton_engines.query\n",
        "testing/fake": "from ..slots import Slots\nclass Fake:\n    pass\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(source)
    assert list(upward_imports(structure.find_modules({"baton_engines": folder}))) == [
        "baton_engines.policies.base -> baton_engines.testing",
        "baton_engines.query -> baton_engines.slots",
    ]


@pytest.mark.parametrize("package", ["baton_kernels", "baton_engines", "bench", "emulation"])
def test_no_import_cycle(package):
    """Neither between modules nor between rooms, including imports for a type checker."""
    modules = structure.find_modules({package: structure.find_packages(ROOT)[package]})
    graph = structure.import_graph(modules)
    assert structure.find_cycles(graph) == structure.find_cycles(structure.contract(graph)) == []


def test_a_cycle_is_found(tmp_path):
    for name, source in {
        "__init__": "from .a import A\nfrom . import _C\n",
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\nA = 1\n",
        "b": "def f():\n    from p import c\nB = 1\n",
        "c": "import p.a\n",
        "d": "from . import A\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    graph = structure.import_graph(structure.find_modules({"p": tmp_path}))
    assert graph == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p"}}
    assert structure.find_cycles(graph) == [["p.a", "p.b", "p.c"]]


# Private names of namedtuple, torch and transformers that have no public equivalent.
FOREIGN_PRIVATE = {
    "_replace",
    "_asdict",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_dynamo",
    "_attn_implementation",
    "_schema",
}


def private_names(source):
    """Private attributes of other objects than self that a module uses and does not define."""
    own, used = set(FOREIGN_PRIVATE), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_self:
                used[node.attr] = node.lineno
            elif isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    return {name: line for name, line in used.items() if name not in own}


def test_private_names_of_the_engines_stay_in_their_module():
    folder = ROOT / "python" / "baton_engines"
    found = {path: private_names(path.read_text()) for path in folder.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_private_name_of_another_module_is_found():
    twin = "class A:\n    def f(self, a):\n        self._x = a._x\n        a._y = 1\n"
    assert private_names(twin) == {"_y": 4}
    assert private_names("def f(query):\n    return query._sampler\n") == {"_sampler": 2}


def test_reference_imports_torch_alone():
    for path in (PACKAGE / "reference").glob("*.py"):
        for name in imports(path):
            own = path.name == "__init__.py" and name.startswith("baton_kernels.reference.")
            # Helpers that several of them share; a helper itself imports torch only.
            own = own or name.startswith("baton_kernels.reference._")
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

    A file in csrc next to the ops' files begins with the name of its op, or serves all of them;
    helpers of several ops have separate folders.
    """
    common = {"kernels.h", "kernel_table.cpp", "fill_indices.cu"}
    for folder in ("cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).glob("*.*"):
            assert path.name in common or path.name.startswith(tuple(OPS)), path


def test_cuda_kernels_are_bound():
    """An op with a CUDA kernel has a CUDA binding, which shares the checks of the CPU's."""

    def names(folder, suffix):
        return {path.stem for path in (ROOT / "csrc" / folder).rglob(f"*{suffix}")} & set(OPS)

    assert (
        names("cuda", ".cu") == names("bindings/cuda", ".cpp") == names("bindings", ".h") != set()
    )


def test_every_layer_has_these_ops_alone():
    found = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")}
    # linear's arguments besides a plain weight exist on the CPU only.
    assert found - set(OPS) == {"checks", "linear_packed", "packed_weight"}
    assert {path.stem for path in (PACKAGE / "reference").glob("[!_]*.py")} == set(OPS)


def has_out(op):
    """Whether results can be written into existing tensors: torch's overload `out`."""
    return "out" in getattr(torch.ops.baton_kernels, op).overloads()


# Arguments of a Python function that choose an overload, so the schemas do not have them.
CHOICES = {"out": "out", "return_lse": "lse"}


@pytest.mark.parametrize("op", OPS)
def test_signatures_agree(op):
    """The Python function, the reference and the schemas have the same arguments in one order."""
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
