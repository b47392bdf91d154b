"""The CPU kernels' threads (csrc/cpu/host/team.h): under sanitizers, and as seen from Python. Also
torch's threads in their place."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import baton_kernels
from baton_kernels.testing import assert_same_bits, cpu_threads

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, **environment: str) -> str:
    """The output of a new process that runs the script and ends by itself."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_team_under_a_sanitizer(sanitizer, tmp_path):
    program = tmp_path / "team"
    subprocess.run(
        [
            os.environ.get("CXX", "g++").split()[0], "-std=c++20", "-O1", "-g", "-Wall", "-Wextra",
            "-Werror", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all",
            "-I", "csrc", "tests/cpu/team.cpp", "csrc/cpu/host/team.cpp", "-o", str(program),
        ],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, 256, generator=generator) for size in (40, 1500))


def test_bits_are_the_same_for_any_number_of_threads():
    x, weight = problem()
    with cpu_threads(1):
        expected = baton_kernels.linear(x, weight)
    for count in (2, 3, 8, 1, 5):
        with cpu_threads(count):
            for _ in range(20):
                assert_same_bits(baton_kernels.linear(x, weight), expected, f"{count} threads")


def test_results_are_the_same_from_several_calling_threads():
    x, weight = problem()
    expected = baton_kernels.linear(x, weight)
    wrong = []

    def call() -> None:
        torch.set_num_threads(3)
        for _ in range(50):
            if not torch.equal(baton_kernels.linear(x, weight), expected):
                wrong.append(threading.current_thread().name)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.fixture
def on_torch_threads():
    baton_kernels.use_torch_threads()
    yield
    baton_kernels.use_torch_threads(False)


@pytest.mark.usefixtures("on_torch_threads")
def test_bits_are_the_same_on_torch_threads():
    x, weight = problem()
    baton_kernels.use_torch_threads(False)
    expected = baton_kernels.linear(x, weight)
    baton_kernels.use_torch_threads()
    for count in (1, 2, 3, 8):
        with cpu_threads(count):
            for _ in range(20):
                # An operator of torch, whose threads spin for a while after it.
                torch.mm(x, weight.T)
                assert_same_bits(baton_kernels.linear(x, weight), expected, f"{count} threads")


@pytest.mark.usefixtures("on_torch_threads")
def test_torch_threads_compute_in_the_mode_of_the_caller():
    """Each of torch's threads has a floating-point mode, which its operators do not change."""
    x, weight = (0.5 * torch.finfo(torch.float32).tiny * torch.ones(6, 48), torch.ones(1500, 48))
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a CPU on which torch can flush subnormal numbers, as x86-64")
    try:
        with cpu_threads(3):
            flushed = [baton_kernels.linear(x, weight) for _ in range(20)]
    finally:
        torch.set_flush_denormal(False)
    with cpu_threads(3):
        kept = [baton_kernels.linear(x, weight) for _ in range(20)]
    assert not any(y.any() for y in flushed) and all((y > 0).all() for y in kept)


CALL = """
    import os, threading, time, torch, baton_kernels

    x, weight = torch.ones(40, 256), torch.ones(1500, 256)

    def call():
        # Compared in Python: threads of torch's own operators do not survive a fork.
        y = baton_kernels.linear(x, weight)
        assert y[::13, ::7].tolist() == [[256.0] * 215] * 4

    def helpers():
        names = []
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().strip())
        return names.count("baton-helper")

    def wait_for_helpers(count):
        # A thread takes its name when it runs.
        end = time.monotonic() + 10
        while helpers() != count and time.monotonic() < end:
            time.sleep(0.01)
        return helpers()
"""


def test_there_are_as_many_threads_as_torch_takes():
    counts = """
    counts = []
    for threads in (1, 3, 2, 5):
        torch.set_num_threads(threads)
        call()
        counts.append(wait_for_helpers(max([threads - 1, *counts])))
    print(*counts)
    """
    # Needing fewer helpers does not end the existing ones: they sleep.
    assert run(CALL + counts).split() == ["0", "2", "2", "4"]


def test_there_are_no_threads_of_our_own_beside_torchs():
    counts = """
    torch.set_num_threads(3)
    baton_kernels.use_torch_threads()
    call()
    before = wait_for_helpers(0)
    threads = len(os.listdir("/proc/self/task"))
    baton_kernels.use_torch_threads(False)
    call()
    print(before, wait_for_helpers(2), len(os.listdir("/proc/self/task")) - threads)
    """
    assert run(CALL + counts).split() == ["0", "2", "2"]


def test_forked_processes_compute():
    fork = """
    def fork(generations):
        child = os.fork()
        if child == 0:
            call()
            if generations > 1:
                fork(generations - 1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        call()

    torch.set_num_threads(3)
    call()
    fork(2)
    """
    run(CALL + fork)


def test_a_process_ends_while_helpers_are_awake():
    end = """
    def several():
        torch.set_num_threads(3)
        for _ in range(20):
            call()

    callers = [threading.Thread(target=several) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(4)
    call()
    """
    run(CALL + end)


def test_signals_reach_the_programs_own_threads():
    """Helpers block signals: an interrupt ends the sleep of the thread that waits for it."""
    signals = f"""
    torch.set_num_threads(3)
    call()
    wait_for_helpers(2)
    blocked = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/status") as file:
            status = dict(line.split(":\\t", 1) for line in file)
        if status["Name"].strip() == "baton-helper":
            blocked.append(int(status["SigBlk"], 16) >> {signal.SIGINT - 1} & 1)
    print(*blocked)
    """
    assert run(CALL + signals).split() == ["1", "1"]
