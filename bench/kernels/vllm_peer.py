"""vLLM's CPU attention as a peer, in the environment that `make bench-peers` makes.

It has other dependencies, so it runs in a separate process that receives the same queries, keys and
values as files. Its output is checked here, as that of all others.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from .attention_work import AttentionWork
from .measure import Effort, Way

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
RUNNER = Path(__file__).with_name("vllm_runner.py")
NAME = "vLLM cpu_attention"


class Vllm:
    """The process; started on first use."""

    def __init__(self, python: Path = PYTHON):
        self.python, self.versions = python, {}
        self._process: subprocess.Popen | None = None

    def ways(self, work: AttentionWork, effort: Effort) -> list[Way]:
        """Its times on this work for each block size, or why it has none."""
        if not self.python.exists():
            return [Way(NAME, missing="run `make bench-peers`")]
        try:
            answers = self._ask(work, effort)
        except RuntimeError as error:
            return [Way(NAME, missing=str(error))]
        ways = []
        for answer in answers:
            name = f"{NAME}, block {answer['block']}"
            if "error" in answer:
                ways.append(Way(name, missing=answer["error"].splitlines()[0][:100]))
                continue
            ways.append(
                Way(
                    f"{name}, {answer['isa']}",
                    [lambda output=answer["output"]: output],
                    work.check,
                    times=answer["times"],
                )
            )
        return ways

    def _ask(self, work: AttentionWork, effort: Effort) -> list[dict]:
        if self._process is None:
            command = [str(self.python), str(RUNNER)]
            # Also applies to threads that are not torch's.
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
            atexit.register(self._process.kill)
            self._wait("bench: ready")
        rows = [work.row(0, row) for row in range(len(work.lengths))]
        keys, values = (
            torch.cat([row[which].transpose(0, 1) for row in rows]).contiguous() for which in (0, 1)
        )
        problem = {
            "query": work.query, "keys": keys, "values": values, "lengths": work.index[2],
            "cu_seqlens": work.cu_seqlens, "layers": work.layers,
            "threads": torch.get_num_threads(), "seconds": effort.seconds,
            "least": effort.least, "most": effort.most,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("problem", "result")]
            torch.save(problem, files[0])
            print(*files, file=self._process.stdin, flush=True)
            self._wait("bench: done")
            result = torch.load(files[1])
        self.versions = result["versions"]
        return result["answers"]

    def _wait(self, line: str) -> None:
        for printed in self._process.stdout:
            if printed.strip() == line:
                return
        code, self._process = self._process.wait(), None
        raise RuntimeError(f"the process of vLLM ended with code {code}")
