"""Errors of the engines begin with the public name that the caller used, e.g. `Relay.submit: `."""

import ast
import re
from pathlib import Path

import pytest

import baton_engines
from baton_engines import huggingface, invariance, policies, prefill
from baton_engines.invariance.openai_target import OpenAITarget
from baton_engines.prefill.apart import Apart

FOLDER = Path(baton_engines.__file__).parent
# `cli` speaks to users rather than callers; `testing` raises what its tests expect.
ROOMS = sorted({path.parent.name for path in FOLDER.glob("*/__init__.py")} - {"cli", "testing"})
# `model` is the object that the caller called: the patched model's own method.
OWN_NAMES = {"model.forward", 'attn_implementation="baton"'}
# Names of baton_engines.prefill.ray, which cannot be imported without Ray.
OWN_NAMES |= {"prefill.ray", "Remote"}
# Names in the vLLM backend, which vLLM calls: the module, and the variable that it reads.
OWN_NAMES |= {"baton_engines.vllm", "BATON_VLLM"}
# A package that cannot be imported together with another transformers.
OWN_NAMES |= {"baton_engines.huggingface"}
# Requests that clients send over HTTP.
OWN_NAMES |= {"request", "Engine"}
# Causes that are included in another error, which names the called function.
CAUSES = ("folder ", "a callback must not return an awaitable, got ")


def public_names():
    """Dotted names in the documentation, without the package in front."""
    names = {name: getattr(baton_engines, name) for name in baton_engines.__all__}
    names |= {"policies": policies, "prefill": prefill, "Apart": Apart}
    names |= {"OpenAITarget": OpenAITarget}
    for module in (huggingface, invariance, policies, prefill):
        names |= {name: getattr(module, name) for name in module.__all__}
    return names


def is_public(prefix):
    first, *rest = prefix.split(".")
    value = public_names().get(first)
    for name in rest:
        value = getattr(value, name, None)
    return value is not None


def messages(source):
    """The beginnings of the messages of all errors that a file creates; None for one that begins
    with a variable."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        if not node.func.id.endswith("Error") or node.func.id == "AttributeError":
            continue
        # Begins with the engine that was called, or with its answer.
        if node.func.id == "TargetError":
            continue
        text = node.args[0]
        if isinstance(text, ast.JoinedStr):
            text = text.values[0]
        yield text.value if isinstance(text, ast.Constant) else None


@pytest.mark.parametrize("room", ROOMS)
def test_errors_begin_with_a_public_name(room):
    for path in (FOLDER / room).glob("*.py"):
        for message in messages(path.read_text()):
            if message is None or message in CAUSES:
                continue
            # A method's name may be a variable: f"Relay.{where}: ...".
            found = re.match(r'([A-Za-z_][\w.="]*?)(: |\.$)', message)
            assert found, f"{path.name}: {message!r} names nobody"
            assert found[1] in OWN_NAMES or is_public(found[1]), f"{path.name}: {message!r}"


def test_the_check_finds_what_it_looks_for():
    source = 'raise ValueError(f"submit: x must be {1}")\nraise TypeError("Relay.submit: y")\n'
    assert list(messages(source)) == ["submit: x must be ", "Relay.submit: y"]
    assert is_public("Relay.submit") and not is_public("submit") and not is_public("Relay.give")
