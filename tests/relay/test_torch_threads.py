"""A greedy decode step uses none of torch's own threads: once woken, they spin for a while on the
cores that the ops need, and a step takes a third longer."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from baton_engines.relay import Relay
from baton_engines.testing.small_llama import small_llama
from baton_kernels.testing import cpu_threads

TASKS = Path("/proc/self/task")


def cpu_seconds() -> dict[int, float]:
    """CPU seconds of each thread."""
    return {
        int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9
        for task in TASKS.iterdir()
    }


def workers_of_torch() -> list[int]:
    """The threads that compute a large elementwise operator together with this one."""
    x = torch.ones(2**22)
    before = cpu_seconds()
    for _ in range(5):
        x.exp_()
    after = cpu_seconds()
    others = after.keys() - {threading.get_native_id()}
    return [tid for tid in others if after[tid] - before.get(tid, 0.0) > 1e-3]


def when_asleep(workers: list[int]) -> dict[int, float]:
    """The CPU seconds once the workers spin no longer, which takes longer on a busy machine."""
    seconds = cpu_seconds()
    for _ in range(100):
        time.sleep(0.1)
        before, seconds = seconds, cpu_seconds()
        if all(before[tid] == seconds[tid] for tid in workers):
            break
    return seconds


@pytest.mark.skipif(
    not (TASKS / str(os.getpid()) / "schedstat").exists(),
    reason="needs schedstat in /proc, which some kernels and containers lack",
)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_greedy_steps_leave_torchs_threads_asleep(rows, dtype):
    # The number of logits of real models: torch divides tensors of more than 32768 elements.
    model = small_llama(dtype=dtype, vocab_size=49152)
    with cpu_threads(2), Relay(model, rows, 24) as relay:
        for _ in range(rows):
            relay.submit([1, 2, 3], max_new_tokens=20, eos=None)
        workers = workers_of_torch()
        assert workers
        for _ in range(3):
            relay.step()
        asleep = when_asleep(workers)
        for _ in range(10):
            relay.step()
        after = cpu_seconds()
        assert {tid: after[tid] - asleep[tid] for tid in workers} == dict.fromkeys(workers, 0.0)
