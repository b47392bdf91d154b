"""The same requests through other engines, each in a separate environment and process.

`make bench-engines` makes the environments. An engine that is not installed, or fails, becomes a
row that says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from baton_engines.llama.load import cache_folder, smollm2_folder

from .run import Job, Run, latencies, rates

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Engine:
    """An engine and where it is installed.

    Attributes:
        name: as tables print it; its worker is `workers/<name>_worker.py`.
        says: its description.
        environment: folder of the virtual environment, in the checkout.
        options: for its worker, which passes them to the engine.
        variables: environment variables of the process, in addition to this one's.
    """

    name: str
    says: str
    environment: str
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """The interpreter of the engine's environment; None if the engine is not installed."""
        return ROOT / self.environment / "bin" / "python"

    def model_folder(self) -> Path:
        """SmolLM2 in the format that the engine reads."""
        return openvino_folder() if self.name == "openvino" else smollm2_folder()


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("openvino", "OpenVINO GenAI, continuous batching on the CPU", ".venv-openvino"),
        Engine("vllm", "vLLM on the CPU, chunked prefill and paged cache", ".venv-vllm"),
    )
}


def openvino_folder() -> Path:
    """SmolLM2 in OpenVINO's format, in the cache; optimum-intel exports it there when it is
    missing.

    Raises:
        RuntimeError: the export failed.
    """
    folder = cache_folder() / "smollm2-135m-instruct-1-openvino"
    if folder.is_dir():
        return folder
    command = (
        ROOT / ".venv-openvino" / "bin" / "optimum-cli", "export", "openvino",
        "--model", smollm2_folder(), "--task", "text-generation-with-past",
        "--weight-format", "fp32", "--disable-convert-tokenizer",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        done = subprocess.run([*command, made], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"openvino: model must be exported, got {_last_line(done.stderr)}")
        made.replace(folder)
    return folder


class EngineProcess:
    """An engine that has loaded the model and waits for its next turn.

    Args:
        engine: which one.
        jobs: what it serves at each turn, or parts of which; all submitted at once.
        dtype: of weights and computation.
        slots: the most queries at a time.

    Attributes:
        about: the engine's description of itself.

    Raises:
        RuntimeError: the engine is not installed or did not start; the message says why.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job], dtype: str, slots: int):
        if not engine.python.exists():
            raise RuntimeError(f"not installed: `make bench-engines` makes {engine.environment}")
        self.engine = engine
        self._requests = [job.request for job in jobs]
        self._scratch = tempfile.TemporaryDirectory()
        work = Path(self._scratch.name) / "work.json"
        work.write_text(
            json.dumps(
                {
                    "model": str(engine.model_folder()),
                    "dtype": dtype,
                    "slots": slots,
                    "threads": torch.get_num_threads(),
                    "options": engine.options,
                    "jobs": [(job.token_ids, job.request.output_tokens) for job in jobs],
                }
            )
        )
        self._log = (Path(self._scratch.name) / "log").open("w+")
        self._process = subprocess.Popen(
            [engine.python, WORKERS / f"{engine.name}_worker.py", work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                **engine.variables,
            },
        )
        self.about: dict[str, Any] = self._read()

    def run(self, begin: int = 0, end: int | None = None) -> Run:
        """Serve the jobs from `begin` to before `end` once; default: all of them.

        Raises:
            RuntimeError: the process has ended.
        """
        print(json.dumps([begin, end]), file=self._process.stdin, flush=True)
        answer = self._read()
        requests = self._requests[begin:end]
        figures = {
            **rates(requests, answer["seconds"]),
            **latencies(requests, answer["times"]),
            **answer["figures"],
        }
        return Run(answer["tokens"], figures)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._scratch.cleanup()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.engine.name}: {_last_line(self._log.read())}")
        return json.loads(line)


def _last_line(text: str) -> str:
    return ([line for line in text.splitlines() if line.strip()] or ["ended without a word"])[-1]
