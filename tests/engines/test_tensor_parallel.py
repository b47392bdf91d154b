"""A model sharded over two processes by transformers' own tensor parallelism, on our attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import generate, make, prompts

RANK = Path(__file__).parents[1] / "support" / "hf_tensor_parallel.py"


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one_process(tmp_path):
    model, (ids, mask) = make("qwen3"), prompts()
    model.save_pretrained(tmp_path)
    texts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    output = tmp_path / "tokens.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(RANK), str(tmp_path), str(output),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = json.loads(output.read_text())
    assert ranks[0] == ranks[1]
    want = generate(model, "eager", ids, mask, 8).tolist()
    # Each has one of the two KV heads.
    assert ranks[0] == {"generate": want, "relay": want, "kv_heads": 1, "ranks": 2}
