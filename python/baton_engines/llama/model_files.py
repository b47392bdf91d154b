"""Finds damaged or missing files of a model folder before a model is built from them.

An interrupted download, a Git LFS pointer or a web page instead of a file are common, and the
errors of the readers of these formats name neither the file nor the remedy.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
# Files that transformers reads if there are no safetensors.
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LFS = b"version https://git-lfs"
_AGAIN = "fetch it again"


class ModelFileError(ValueError):
    """A file of a model folder is missing or damaged; the message names it."""


def check_model_folder(folder: Path) -> None:
    """Raise unless the folder's files appear to be what their names say.

    Args:
        folder: an existing folder.

    Raises:
        ModelFileError: a file is missing or damaged.
        OSError: a file cannot be read.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelFileError(
            f"{folder} holds a PEFT adapter (adapter_config.json) and not a whole model; merge it "
            "into its base model (merge_and_unload) and save the result"
        )
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"folder {folder} must hold a config.json, got none")
    for path in sorted(folder.glob("*.json")):
        _check_beginning(path)
    for path in _weight_files(folder):
        if not path.is_file():
            raise ModelFileError(f"{path} is missing, which {_INDEX} names; {_AGAIN}")
        _check_beginning(path)
        if path.suffix == ".safetensors":
            _check_safetensors(path)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file from which a tokenizer could be read."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        try:
            names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
            return [folder / name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"{folder / _INDEX} is damaged ({type(error).__name__}); {_AGAIN}"
            ) from error
    pickled = [folder / name for name in _PICKLED if (folder / name).is_file()]
    if not pickled:
        raise ModelFileError(
            f"folder {folder} must hold weights (*.safetensors), got none with a name that "
            "transformers knows"
        )
    return pickled


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(256)
    if not beginning:
        raise ModelFileError(f"{path} is empty; {_AGAIN}")
    if beginning.startswith(_LFS):
        raise ModelFileError(
            f"{path} is a Git LFS pointer and not the file itself; `git lfs pull` fetches that"
        )
    if beginning.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise ModelFileError(f"{path} is a web page and not the file itself; {_AGAIN}")


def _check_safetensors(path: Path) -> None:
    try:
        # Opening compares the header with the file's length and reads no tensor.
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelFileError(f"{path} is damaged or cut off ({error}); {_AGAIN}") from error
