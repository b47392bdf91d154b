"""Model folders with typical damage: cut off, pointers, web pages, tensors missing, no
tokenizer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model
from typer.testing import CliRunner

from baton_engines import ModelLoadError, load_model
from baton_engines.cli.main import app

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refused(folder) -> str:
    """The error of load_model, which is also the one line that the command prints."""
    with pytest.raises(ModelLoadError) as caught:
        load_model(folder)
    result = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "a"])
    assert result.exit_code == 2 and "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line == "error: " + " ".join(str(caught.value).split())
    return str(caught.value)


def drop(folder, *names):
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in names},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.1.mlp.up_proj.weight"],
        ["lm_head.weight"],
        ["model.norm.weight", "model.embed_tokens.weight"],
    ],
    ids=lambda names: names[0],
)
def test_missing_tensors_are_named_and_never_random(folder, names):
    drop(folder, *names)
    message = refused(folder)
    assert "must hold every tensor of the model" in message
    assert all(name in message for name in names)


def test_many_missing_tensors_are_counted(folder):
    drop(folder, *(name for name in load_file(folder / WEIGHTS) if "layers.1" in name))
    assert "and 4 more" in refused(folder)


def test_tied_weights_are_not_missing(tmp_path):
    save_tiny_model(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    model, _ = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[: len(data) // 2], "model.safetensors is damaged or cut off"),
        (lambda data: data[:5], "model.safetensors is damaged or cut off"),
        (lambda data: data + b"\0", "model.safetensors is damaged or cut off"),
        (lambda data: b"", "model.safetensors is empty; fetch it again"),
        (lambda data: POINTER, "model.safetensors is a Git LFS pointer"),
        (lambda data: PAGE, "model.safetensors is a web page"),
        (lambda data: b"\xff" * 300, "model.safetensors is damaged or cut off"),
    ],
    ids=["half", "header", "longer", "empty", "pointer", "page", "noise"],
)
def test_damaged_weights(folder, content, message):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content(data))
    assert message in refused(folder)


def sharded(folder):
    load_model(folder)[0].save_pretrained(folder, max_shard_size="100KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


def test_shards(folder):
    shards = sharded(folder)
    assert len(shards) > 1
    load_model(folder)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-8])
    assert f"{shards[1].name} is damaged or cut off" in refused(folder)
    shards[1].unlink()
    assert f"{shards[1].name} is missing" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is damaged" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [POINTER, PAGE, b"", b"{"], ids=["lfs", "page", "empty", "cut"])
def test_damaged_descriptions(folder, name, content):
    (folder / name).write_bytes(content)
    assert "load_model:" in refused(folder)


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "must hold weights (*.safetensors), got none" in refused(folder)


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    message = refused(folder)
    assert "holds a PEFT adapter" in message and "merge_and_unload" in message


def test_a_folder_without_a_tokenizer_answers_token_ids(folder):
    for path in folder.glob("token*"):
        path.unlink()
    assert load_model(folder)[1] is None
    result = CliRunner().invoke(
        app,
        ["generate", "--model", str(folder), "--max-new-tokens", "3"],
        input='{"token_ids": [1, 2]}\n{"prompt": "text"}\n',
    )
    assert result.exit_code == 1
    answered, refused_line = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answered["token_ids"]) == 3 and answered["text"] is None
    assert "has no tokenizer: give token_ids instead of text" in refused_line["error"]
    assert all(isinstance(id, int) for id in answered["token_ids"])


def test_weights_that_are_not_finite_fail_their_queries(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"][3] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "a"])
    assert result.exit_code == 1
    assert "must be finite" in json.loads(result.stdout)["error"]
