"""`scripts/soak.py operations`, and that the machines it runs find planted defects."""

import random
import re
from pathlib import Path

import machine_run
import pytest
import warm

from baton_engines.relay.batch import Batch
from baton_kernels import kv_cache

ROOT = Path(__file__).resolve().parents[2]


# Shard 0 has real prefill processes, which take seconds to start.
@pytest.mark.parametrize("shard", [1, pytest.param(0, marks=pytest.mark.full)])
def test_operations_of_every_machine(shard):
    seed = random.randrange(2**32)
    done = warm.run(
        ROOT / "scripts" / "soak.py", "operations", "--operations", 1, "--seed", seed,
        "--begin", shard, "--examples", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"operations, seed {seed}:" in done.stdout
    counts = dict(re.findall(r"^  (.*): ([\d,]+) operations$", done.stdout, re.M))
    expected = machine_run.machines().keys() - (machine_run.EVERY_SHARDS if shard else ())
    assert set(counts) == expected
    assert sum(int(count.replace(",", "")) for count in counts.values()) > 300


def test_a_shard_is_its_seed():
    names = ["cache, aligned", "relay"]
    reports = [machine_run.run_shard(seed, names, 2) for seed in (7, 7, 8)]
    assert reports[0] == reports[1] != reports[2]


def test_a_row_that_moves_without_its_last_token_is_found(monkeypatch):
    whole = kv_cache.move_kv

    def lossy(*arguments):
        whole(*arguments[:-1], (arguments[-1] - 1).clamp_(min=0))

    monkeypatch.setattr(kv_cache, "move_kv", lossy)
    for name in ("cache, ragged", "cache, aligned"):
        (wrong,) = machine_run.run_shard(0, [name], shrinks=False).wrong
        assert "AssertionError" in wrong


def test_a_row_that_a_cancelled_query_keeps_is_found(monkeypatch):
    end = Batch.end

    def keeping(self, query, status, *rest):
        with monkeypatch.context() as patch:
            if status == "cancelled":
                patch.setattr(self.slots, "leave", lambda query: None)
            end(self, query, status, *rest)

    monkeypatch.setattr(Batch, "end", keeping)
    assert len(machine_run.run_shard(0, ["relay"], shrinks=False).wrong) == 1
