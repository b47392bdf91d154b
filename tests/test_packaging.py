"""Whether the files around the code agree, and the checks of the documentation."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import baton_kernels

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_one_version():
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    assert baton_kernels.__version__ == version
    assert baton_kernels.build_info()["version"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_source_tree_that_is_not_installed_has_a_version(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert baton_kernels.info._version() == "0+unknown"


def test_a_commit_is_checked_by_the_tools_of_make_lint():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format", "codespell"):
        pinned = re.search(rf'"{tool}==(.+?)"', PYPROJECT)[1]
        found = re.findall(rf'\["{tool}(?:\[\w+\])?==(.+?)"\]', hooks)
        assert found and set(found) == {pinned}, tool


def test_an_sdist_has_what_a_wheel_is_compiled_from(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.check_output(["tar", "-tzf", str(sdist)], text=True).splitlines()
    packed = {name.split("/", 1)[1] for name in listed if not name.endswith("/")}
    sources = subprocess.check_output(["git", "ls-files", "csrc"], cwd=ROOT, text=True).split()
    assert {"CMakeLists.txt", "setup.py", "LICENSE", *sources} <= packed


# The checks of scripts/docs.py.


@pytest.fixture
def docs(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("docs", ROOT / "scripts" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](there.md) [b](there.md#a-heading-of-2-words) [c](#here) [d](https://x.org)", None),
        ("`[a](gone.md)` and\n```\n[b](gone.md)\n```", None),
        ("[a](gone.md)", "no such file: gone.md"),
        ("![a](gone.png)", "no such file: gone.png"),
        ("[a](../outside.md)", "no such file: ../outside.md"),
        ("[a](there.md#gone)", "no such heading: there.md#gone"),
        ("[a](#gone)", "no such heading: #gone"),
    ],
)
def test_links_of_the_sources(docs, tmp_path, text, fault):
    (tmp_path / "there.md").write_text("# A `heading` of 2 words\n")
    (tmp_path / "page.md").write_text(f"# Here\n\n{text}\n")
    found = docs.broken_links(tmp_path / "page.md")
    assert found == ([f"page.md: {fault}"] if fault else [])


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="there.html#id">', None),
        ('<a href="https://example.org">', None),
        ('<a href="gone.html">', "no such file: gone.html"),
        ('<a href="there.html#gone">', "no such anchor: there.html#gone"),
        ('<img src="gone.png">', "no such file: gone.png"),
        ('<script src="https://example.org/x.js">', "loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads //example.org/x.css"),
    ],
)
def test_links_of_the_site(docs, tmp_path, html, fault):
    (tmp_path / "there.html").write_text('<p id="id">')
    (tmp_path / "page.html").write_text(html)
    assert docs.faults_of_site(tmp_path) == ([f"page.html: {fault}"] if fault else [])
