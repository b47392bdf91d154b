"""The relay's peak memory: the cache, and a workspace that does not grow with the queries."""

import json
from pathlib import Path

import pytest
import warm

MIB = 1 << 20
# The memory that the allocator keeps varies between runs by a few MiB.
TOLERANCE = 8 * MIB
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(),
        reason="needs /proc/self/clear_refs, which some containers lack",
    ),
]

# Each run has a separate process: the first would leave its memory to the second.
SERVE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from baton_engines.llama import patch_llama
from baton_engines.relay import Relay
from baton_engines.testing.small_llama import small_llama

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

count, leak = map(int, sys.argv[1:])
torch.set_num_threads(1)
kept = []
with patch_llama(small_llama(vocab_size=200)) as patched, Relay(patched, 4, 64) as relay:
    def serve(number):
        for i in range(number):
            relay.submit(torch.arange(4 + i % 9), max_new_tokens=1 + i % 7, eos=None)
        while relay.step():
            yield relay.cache
    for _ in serve(4):  # what is loaded and allocated by the first forward
        pass
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS") - relay.cache.bytes_committed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    in_use = committed = 0
    for cache in serve(count):
        in_use = max(in_use, cache.bytes_in_use)
        committed = max(committed, cache.bytes_committed)
        kept += [torch.ones(leak)] if leak else []
    peak, finished = status("VmHWM"), relay.counters.finished
print(json.dumps({"finished": finished, "in_use": in_use, "committed": committed,
                  "workspace": peak - before - committed}))
"""


def serve(count: int, leak: int = 0) -> dict:
    """The memory of a relay with four slots for `count` queries; `leak` floats stay at every
    step."""
    done = warm.run("-c", SERVE, count, leak)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_workspace_does_not_grow_with_the_queries():
    few, many = serve(24), serve(240)
    assert (few["finished"], many["finished"]) == (28, 244)
    for case in (few, many):
        assert 0 < case["in_use"] <= case["committed"]
    assert abs(many["workspace"] - few["workspace"]) < TOLERANCE
    # A leak is noticed.
    assert serve(24, leak=MIB // 4)["workspace"] > few["workspace"] + TOLERANCE
