"""transformers' own continuous batching, `generate_batch`, on sdpa and on this package.

The second uses attention from the folder that `scripts/hub_kernel.py` writes, which needs the
package `kernels`. Each side runs in a separate process, because transformers reads LOCAL_KERNELS
only once; their tokens are compared in float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "baton/flash"
# The version that transformers 5.23 and 5.24 require; PyPI's newest has the same interface.
WANTED = "0.18.2"


def measure_here(name: str, dtype: str, attention: str, queries: int, runs: int) -> dict:
    """Measures in this process: seconds of each run after a first one, and tokens of each query."""
    version = importlib.metadata.version
    importlib.metadata.version = lambda package: (
        WANTED if package == "kernels" else version(package)
    )

    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from . import steps

    model = steps.make_model(name, steps.DTYPES[dtype])
    options = {"allow_all_kernels": True} if attention == NAME else {}
    model.set_attn_implementation(attention, **options)
    generator = torch.Generator().manual_seed(0)
    lengths = steps.row_lengths(queries, 256)
    prompts = [torch.randint(5, 30000, (n,), generator=generator).tolist() for n in lengths]
    generation = GenerationConfig(
        max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    seconds = []
    for _ in range(1 + runs):
        begin = time.perf_counter()
        outputs = model.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=48, max_batch_tokens=256
            ),
            progress_bar=False,
        )
        seconds.append(time.perf_counter() - begin)
        names = sorted(outputs, key=lambda request: int(request.split("_")[-1]))
        tokens = [outputs[request].generated_tokens for request in names]
    return {"seconds": seconds[1:], "tokens": tokens}


def measure(name: str, dtype: str, queries: int = 16, runs: int = 3) -> dict | None:
    """Measures and prints both sides; None without the package `kernels`.

    Raises:
        SystemExit: float32 tokens differ.
    """
    if importlib.util.find_spec("kernels") is None:
        print("generate_batch: needs the package kernels (`make .venv-transformers-5.24/.ready`)")
        return None
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "scripts" / "hub_kernel.py"
        subprocess.run([sys.executable, script, folder], check=True)
        for attention in ("sdpa", NAME):
            command = [sys.executable, "-m", "bench.huggingface.continuous", name, dtype, attention]
            done = subprocess.run(
                [*command, str(queries), str(runs)],
                cwd=ROOT,
                env={**os.environ, "LOCAL_KERNELS": f"{NAME}={folder}"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[attention] = json.loads(done.stdout.splitlines()[-1])
    sides = found["sdpa"], found[NAME]
    if dtype == "float32" and sides[0]["tokens"] != sides[1]["tokens"]:
        raise SystemExit("generate_batch: float32 tokens differ from sdpa's")
    theirs, ours = (statistics.median(side["seconds"]) for side in sides)
    print(
        f"generate_batch, {name}, {queries} queries, {dtype}, median of {runs}: "
        f"sdpa {theirs:.2f} s, {NAME} {ours:.2f} s, {theirs / ours:.2f} times as fast"
    )
    return {attention: side["seconds"] for attention, side in found.items()}


if __name__ == "__main__":
    name, dtype, attention, queries, runs = sys.argv[1:]
    print(json.dumps(measure_here(name, dtype, attention, int(queries), int(runs))))
