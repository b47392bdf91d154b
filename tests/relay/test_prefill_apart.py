"""Prompts that other processes compute: same bits, and what happens when these die, hang or raise.

Nothing of a process may remain: processes are looked up by id, memory and descriptors are counted.
"""

import functools
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import relay_checks
import torch
from relay_checks import assert_right

from baton_engines.llama import patch_llama
from baton_engines.llama.packed_batch import PackedBatch
from baton_engines.prefill.apart import Apart
from baton_engines.prefill.handover import Handover, Sizes
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama
from baton_engines.testing.prefill import ProcessFault
from baton_engines.testing.small_llama import small_llama

# The ids above these are the first tokens of ProcessFault.
prompt = functools.partial(relay_checks.prompt, vocab_size=40)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    files, processes = descriptors(), children()
    yield
    assert children() == processes
    assert descriptors() == files


@pytest.mark.slow
def test_logits_have_the_bits_of_a_prefill_in_the_loop():
    """A real model with one worker or two, queries that enter, leave and are preempted, both
    layouts."""
    model = small_llama()

    def run(prefill, aligned):
        logits: dict[int, list[torch.Tensor]] = {}
        numbers = random.Random(5)
        with Relay(model, 4, 24, aligned=aligned, prefill=prefill) as relay:
            relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(
                row.clone()
            )
            queries = []
            for i in range(18):
                ids = [numbers.randrange(97) for _ in range(numbers.choice([1, 2, 5, 9, 14]))]
                queries.append(relay.submit(ids, max_new_tokens=numbers.randint(1, 9)))
                relay.step()
                if i % 5 == 4 and relay.running:
                    relay.preempt(relay.running[0])
            for query in relay.parked:
                relay.resume(query)
            relay.run()
            assert relay.cache.shape.used == ()
            assert [query.status for query in queries] == ["finished"] * 18
            return [(query.tokens, logits[query.id]) for query in queries], relay.counters

    (expected, _) = run("serial", False)
    for aligned, workers in ((False, 2), (True, 1)):
        found, counters = run(Apart(workers=workers, always=True), aligned)
        # A query that was preempted before its first token is computed once more.
        assert counters.prefills_elsewhere == 18 and counters.prefill_faults == 0
        for (tokens, rows), (right_tokens, right_rows) in zip(found, expected, strict=True):
            assert tokens == right_tokens
            assert torch.equal(torch.stack(rows), torch.stack(right_rows))


def test_a_model_that_was_sent_has_no_second_copy_of_its_weights(tmp_path):
    """The handle that arrives is patched, computes the same bits, and has only packed weights."""
    with patch_llama(small_llama(attention_bias=True)) as llama:
        torch.save(llama, tmp_path / "model")
        arrived = torch.load(tmp_path / "model", mmap=True, weights_only=False)
        attention = arrived.model.model.layers[1].self_attn
        for weight in (attention.q_proj.weight, attention.v_proj.weight):
            assert weight.untyped_storage().nbytes() == weight.element_size()
        logits = []
        for model in (llama, arrived):
            cache = model.new_cache(1, 8)
            cache.allocate(5)
            batch = PackedBatch.from_shape(cache.shape, [0], [5])
            logits.append(model.forward(torch.arange(5), batch, cache))
        assert torch.equal(*logits)
        arrived.undo()
    # The sender was only read.
    assert "forward" not in llama.model.__dict__


def test_a_worker_that_is_killed_is_replaced():
    """Killed while idle, before a job reaches it, and during a job: no query notices."""
    model = FakeLlama()
    with Relay(model, 3, 32, prefill=Apart(always=True)) as relay:
        prefill = relay._loop.in_flight.prefiller
        processes = prefill.process_ids
        os.kill(processes[-1], signal.SIGKILL)
        queries = [relay.submit(prompt(4 + i), max_new_tokens=6) for i in range(4)]
        relay.run()
        processes += prefill.process_ids
        # While it is stopped, its job does not end.
        os.kill(processes[-1], signal.SIGSTOP)
        timer = threading.Timer(0.2, os.kill, (processes[-1], signal.SIGKILL))
        timer.start()
        queries += [relay.submit(prompt(5, i), max_new_tokens=3) for i in range(3)]
        relay.run()
        timer.join()
        processes += prefill.process_ids
        assert_right(model, queries)
        assert relay.counters.prefills_elsewhere == len(queries) == 7
        assert relay.counters.prefill_faults == 0
        assert len(set(processes)) == 3
        assert [psutil.pid_exists(process) for process in processes] == [False, False, True]


@pytest.mark.slow
@pytest.mark.alone  # a worker that does not answer for five seconds is killed
def test_faults_inside_a_worker_end_no_query(tmp_path):
    """One prompt raises, and one kills every process that tries it: the loop computes them. One
    hangs, once: its process is killed, and another process computes it."""
    model = FakeLlama()
    model.fault = ProcessFault(tmp_path / "struck")
    # Longer than other programs could delay the start of a process by using the cores.
    with Relay(model, 5, 32, prefill=Apart(timeout=5)) as relay:
        runner = relay.submit(prompt(3), max_new_tokens=28)
        relay.step()
        bad = []
        for first in (ProcessFault.RAISE, ProcessFault.DIE, ProcessFault.HANG):
            # One after the other, because prompts in one forward fail together.
            bad.append(relay.submit([first, *prompt(4)], max_new_tokens=3))
            relay.step()
        good = relay.submit(prompt(6), max_new_tokens=3)
        relay.run()
        assert_right(model, [runner, *bad, good])
        assert (tmp_path / "struck").exists()
        assert relay.counters.prefill_faults == 2
        assert relay.counters.prefills_elsewhere == 2


def test_workers_that_cannot_start_any_more_leave_prompts_to_the_loop(monkeypatch):
    model = FakeLlama()
    with Relay(model, 3, 32, prefill=Apart(always=True)) as relay:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        (process,) = relay._loop.in_flight.prefiller.process_ids
        os.kill(process, signal.SIGKILL)
        queries = [relay.submit(prompt(4, i), max_new_tokens=3) for i in range(9)]
        relay.run()
        assert_right(model, queries)
        assert relay.counters.prefill_faults == 9


def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    model = small_llama()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="worker process .* ended"):
        Relay(model, 2, 16, prefill="apart")
    # The patch is undone.
    assert "forward" not in model.__dict__


def test_a_model_that_cannot_be_sent_is_an_error():
    model = FakeLlama()
    model.fault = lambda rows: None
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError), match="lambda"):
        Relay(model, 2, 16, prefill="apart")


def test_close_and_cancel_while_a_worker_is_busy(tmp_path):
    model = FakeLlama()
    model.fault = ProcessFault(tmp_path / "struck")
    relay = Relay(model, 4, 32, prefill=Apart())
    runner = relay.submit(prompt(3), max_new_tokens=9)
    relay.step()
    hanging, behind = (relay.submit([i, 1, 2], max_new_tokens=4) for i in (ProcessFault.HANG, 1))
    relay.step()
    relay.cancel(behind)
    relay.step()
    begin = time.monotonic()
    relay.close()
    # Well below the 120 seconds of the timeout.
    assert time.monotonic() - begin < 60
    assert [query.status for query in (runner, hanging, behind)] == ["cancelled"] * 3
    assert relay.cache.bytes_committed == 0


def test_memory_of_prompts_goes_with_them():
    model = FakeLlama(max_positions=1 << 16)
    with Relay(model, 2, 1 << 14, prefill=Apart(always=True)) as relay:

        def serve(count):
            for i in range(count):
                relay.submit([i] * 8000, max_new_tokens=2)
            relay.run()
            gc.collect()
            shared = psutil.Process().memory_full_info().shared
            (worker,) = (psutil.Process(i) for i in relay._loop.in_flight.prefiller.process_ids)
            return descriptors(), shared, worker.num_fds(), worker.memory_info().shared

        before, after = serve(2), serve(8)
        # A prompt's keys and values take 2 MiB; a leak of eight would be noticed.
        assert (after[0], after[2]) == (before[0], before[2])
        assert abs(after[1] - before[1]) < 4 << 20 and abs(after[3] - before[3]) < 4 << 20


def test_a_worker_outlives_neither_its_parent_nor_a_ctrl_c(tmp_path):
    """Ctrl-C reaches the process group; the parent then dies without a chance to clean up."""
    code = """
        import os, signal, sys
        from baton_engines.prefill.apart import Apart
        from baton_engines.relay import Relay
        from baton_engines.testing import FakeLlama

        # If the tests run in the background of a shell, they ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        relay = Relay(FakeLlama(), 2, 32, prefill=Apart(always=True))
        try:
            os.killpg(0, signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            pass
        query = relay.submit([1, 2, 3], max_new_tokens=3)
        relay.run()
        assert query.status == "finished" and relay.counters.prefills_elsewhere == 1
        print(*relay._loop.in_flight.prefiller.process_ids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    (worker,) = map(int, done.stdout.split())
    for _ in range(600):
        if not _alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")


def _alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_is_handed_over_lies_side_by_side():
    sizes = Sizes(num_layers=2, num_kv_heads=3, head_dim=16, vocab_size=7, dtype=torch.bfloat16)
    file = os.memfd_create("test")
    try:
        ours = Handover(file, sizes, [2, 5], create=True)
        theirs = Handover(file, sizes, [2, 5])
        ours.tokens.copy_(torch.arange(7))
        assert theirs.prompts() == [[0, 1], [2, 3, 4, 5, 6]]
        for number, (key, value) in enumerate(theirs.rows()):
            assert key.shape == value.shape == (2, (2, 5)[number], 3, 16)
            key.fill_(number + 1)
            value.fill_(-number - 1)
        theirs.logits.fill_(9)
        assert ours.logits.shape == (2, 7) and torch.all(ours.logits == 9)
        assert ours.key[:, :2].unique().tolist() == [1] and ours.key.dtype == torch.bfloat16
        assert ours.value[:, 2:].unique().tolist() == [-2]
        # Writing the other tensors has not changed the tokens.
        assert ours.tokens.tolist() == list(range(7))
        assert os.fstat(file).st_size < 7 * 8 + 2 * 2 * 7 * 3 * 16 * 2 + 2 * 7 * 4 + 4 * 64
    finally:
        os.close(file)


def test_a_model_on_a_gpu_is_refused():
    class OnGpu:
        device = torch.device("cuda", 1)

    with pytest.raises(
        NotImplementedError, match="^Apart: model must be on the CPU, got one on cuda:1"
    ):
        Apart(1).make_workers(OnGpu(), 1)


def test_bad_arguments():
    for name in ("timeout", "start_timeout"):
        with pytest.raises(ValueError, match=f"Apart: {name} must be > 0 seconds, got 0"):
            Apart(**{name: 0})
