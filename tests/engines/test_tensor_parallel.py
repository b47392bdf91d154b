"""A model sharded over two processes by transformers' own tensor parallelism, on our attention."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import warm
from hf_models import generate, make, prompts

RANK = Path(__file__).parents[1] / "support" / "hf_tensor_parallel.py"


# Both ranks, which have the imports of the process that they are forks of.
LAUNCH = """
import os, runpy, signal, sys
del sys.argv[0]
ranks = {}
for rank in "01":
    child = os.fork()
    if not child:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    ranks[child] = rank
while ranks:
    child, status = os.wait()
    del ranks[child]
    if status:
        for other in ranks:
            os.kill(other, signal.SIGKILL)
        sys.exit(1)
"""


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one_process(tmp_path, monkeypatch):
    model, (ids, mask) = make("qwen3"), prompts()
    model.save_pretrained(tmp_path)
    texts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    (tmp_path / "prompts.json").write_text(json.dumps(texts))
    output = tmp_path / "tokens.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    done = warm.run("-c", LAUNCH, RANK, tmp_path, output)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = json.loads(output.read_text())
    assert ranks[0] == ranks[1]
    want = generate(model, "eager", ids, mask, 8).tolist()
    # Each has one of the two KV heads.
    assert ranks[0] == {"generate": want, "relay": want, "kv_heads": 1, "ranks": 2}
