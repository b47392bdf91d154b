"""The compiled libraries: what they need from the machine, and their errors if they do not load.

One file must serve every Python, every torch from 2.10 on, and every Linux that manylinux_2_28
includes; `make test-wheel` checks that on a wheel with the tools of that standard.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton_kernels import _library

LIBRARIES = [library for library in (_library.cpu, _library.cuda) if library]

# The newest symbol versions of glibc 2.28 and of GCC 8's runtime, which the standard names.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def symbols(library: Path) -> list[tuple[bool, str, str]]:
    """(whether the library defines it, version, name) of every dynamic symbol."""
    command = ["objdump", "--dynamic-syms", str(library)]
    found = []
    for line in subprocess.check_output(command, text=True).splitlines():
        # Value, flags, section, size, version (often in parentheses, or none), name.
        match = re.match(r"[0-9a-f]{8,16} .{7} (\S+)\t[0-9a-f]+ +(?:\(?([\w.]+)\)? +)?(\S+)$", line)
        if match:
            found.append((match[1] != "*UND*", match[2] or "", match[3]))
    assert len(found) > 50, "objdump's output was not understood"
    return found


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_it_needs_no_python(library):
    assert not [name for _, _, name in symbols(library) if name.startswith(("Py", "_Py"))]
    headers = subprocess.check_output(["objdump", "--private-headers", library], text=True)
    assert "NEEDED" in headers and "libpython" not in headers


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_it_needs_no_one_version_of_torch(library):
    """torch's stable interface consists of C functions: its C++ symbols change between versions."""
    names = [name for _, _, name in symbols(library)]
    assert [name for name in names if name.startswith("aoti_torch_")]
    assert not [name for name in names if re.match(r"_ZN\w*(c10|at|torch)\d", name)]


def test_it_needs_no_later_runtime_than_manylinux_2_28():
    """The CUDA library's static runtime uses what its machine has: it is built on an older one."""
    later = []
    for _, version, name in symbols(_library.cpu):
        family, _, number = version.partition("_")
        is_number = family in MANYLINUX_2_28 and number[:1].isdigit()  # not e.g. CXXABI_TM_1
        if is_number and tuple(map(int, number.split("."))) > MANYLINUX_2_28[family]:
            later.append((name, version))
    assert not later


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_it_exports_nothing(library):
    """torch makes a library's symbols visible to all later ones, and some of ours are AVX-512."""
    assert not [name for defined, _, name in symbols(library) if defined]


def test_a_package_without_its_library_says_what_to_do(tmp_path):
    package = Path(_library.__file__).parent
    shutil.copytree(package, tmp_path / "baton_kernels", ignore=shutil.ignore_patterns("*.so"))
    done = subprocess.run(
        [sys.executable, "-c", "import baton_kernels"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ImportError: baton_kernels: the compiled library does not load" in done.stderr
    assert "libbaton_kernels.so" in done.stderr and "pip install -e ." in done.stderr
