"""A whole relay on only the Triton kernels, as on a device without our CUDA library.

It runs in Triton's interpreter, so in a separate process; the answers must be those of the C++
kernels.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

SERVE = """
import contextlib, json, sys
from unittest import mock
import torch
import baton_kernels
from baton_kernels import kv_cache, triton
from baton_engines import Relay, policies
from baton_engines.testing.small_llama import small_llama


def serve():
    torch.manual_seed(0)
    model = small_llama(num_hidden_layers=1)
    # Prompts between two steps, as in the paper: a newcomer then moves rows of an aligned cache.
    policy = policies.get("baton", join="never")
    with Relay(model, num_slots=2, capacity=32, policy=policy, aligned=True) as relay:
        queries = [relay.submit([5, 7, 9, 11], max_new_tokens=3, eos=None)]
        queries.append(relay.submit([3, 2], max_new_tokens=2, eos=None))
        relay.step()
        relay.preempt(queries[0])
        queries.append(relay.submit([8, 6, 4, 2, 1, 3], max_new_tokens=2, eos=None))
        relay.resume(queries[0])
        relay.run()
        return [query.tokens if query.error is None else str(query.error) for query in queries]


used = set()


def counted(name):
    def op(*args, **kwargs):
        used.add(name)
        return getattr(triton, name)(*args, **kwargs)

    return op


native = serve()
with contextlib.ExitStack() as patches:
    for name in triton.OPS:
        for module in (baton_kernels, kv_cache):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, counted(name)))
    print(json.dumps({"native": native, "triton": serve(), "used": sorted(used)}))
"""


def test_answers_are_those_of_the_cpu():
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["triton"] == result["native"]
    assert [len(tokens) for tokens in result["native"]] == [3, 2, 2]
    # Relocation (an aligned cache), parking, decode and prefill all took part.
    expected = {"append_kv", "extract_kv", "insert_kv", "linear", "move_kv"}
    assert expected | {"ragged_attention", "rms_norm", "silu_and_mul"} <= set(result["used"])
