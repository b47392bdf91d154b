"""The runtimes of a relay's graphs: CUDA, as far as a machine without a GPU can test it, and its
stand-in, which reports errors that would break on a GPU."""

import itertools

import pytest
import torch
from graph_checks import decoding, ticks

from baton_engines.relay import Relay
from baton_engines.relay.graphs import CudaRuntime, DecodeGraphs
from baton_engines.testing.recorded_graphs import HostWaitError, RecordedGraphs
from baton_engines.testing.small_llama import small_llama

# The stand-in for a GPU reports errors that would break on a GPU.


def capture(function):
    runtime = RecordedGraphs()
    return runtime, runtime.capture(function)


WAITS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "tensor": lambda x: x + torch.tensor([1.0, 2.0]),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_capture_in_which_the_host_waits_is_refused(name):
    with torch.inference_mode(), pytest.raises(HostWaitError):
        capture(lambda: WAITS[name](torch.ones(2)))


@torch.inference_mode()
def test_a_capture_runs_nothing_and_a_replay_waits_for_its_turn():
    x, y = torch.ones(3), torch.zeros(3)
    given = []

    def function():
        given.append(x * 2)
        y.copy_(given[0] + 1)

    runtime, replay = capture(function)
    assert y.tolist() == [0, 0, 0] and given[0].isnan().all()
    x.fill_(5)
    replay()
    assert y.tolist() == [0, 0, 0]
    runtime.wait()
    assert y.tolist() == [11, 11, 11] and given[0].tolist() == [10, 10, 10]
    assert len(given) == 1


@torch.inference_mode()
def test_values_of_the_host_are_built_in():
    """A number of the host is fixed at capture: a relay must not rely on its later values."""
    x, y = torch.ones(2), torch.zeros(2)
    number = 3
    runtime, replay = capture(lambda: y.copy_(x * number))
    number = 4
    replay()
    runtime.wait()
    assert y.tolist() == [3, 3]


def test_graphs_of_a_cache_that_was_left_are_found(monkeypatch):
    """A planted defect: nothing checks whether the cache has moved."""

    def run(graphs):
        model = small_llama(max_position_embeddings=64)
        with Relay(model, 4, 40, cuda_graphs=graphs, clock=ticks()) as relay:
            first, _ = decoding(relay, 2)
            relay.step()
            relay.cancel(first)
            relay.resize(5)
            queries = decoding(relay, 1)
            relay.run()
            return queries[0].tokens

    expected = run(None)
    assert run(RecordedGraphs()) == expected
    prepare = DecodeGraphs._prepare
    monkeypatch.setattr(
        DecodeGraphs, "_prepare", lambda self, longest: self._buffers or prepare(self, longest)
    )
    assert run(RecordedGraphs()) != expected


# CUDA's own calls, as far as a machine without a GPU can test them.


class FakeCuda:
    """Records which calls of torch.cuda are made for which device."""

    def __init__(self, monkeypatch):
        self.current = 0
        self.log = []
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "device", self.device)
        self.pools = itertools.count()
        monkeypatch.setattr(cuda, "graph_pool_handle", self.pools.__next__)
        for name in ("Stream", "Event", "CUDAGraph", "current_stream"):
            monkeypatch.setattr(cuda, name, self.noted(name))
        monkeypatch.setattr(cuda, "graph", self.graph)

    def noted(self, name):
        def call(*args):
            self.log.append((name, self.current, *args))
            return self

        return call

    def device(self, device):
        outer = self

        class Guard:
            def __enter__(self):
                self.before, outer.current = outer.current, device.index

            def __exit__(self, *error):
                outer.current = self.before

        return Guard()

    def graph(self, graph, *, pool, stream, capture_error_mode):
        outer = self

        class Capture:
            def __enter__(self):
                outer.log.append(("begin", outer.current, pool, capture_error_mode))

            def __exit__(self, *error):
                outer.log.append(("end", outer.current))

        return Capture()

    def replay(self):
        self.log.append(("replay", self.current))

    def record(self, stream):
        self.log.append(("record", self.current))

    def synchronize(self):
        self.log.append(("synchronize", self.current))


def test_graphs_of_a_second_gpu_are_made_there(monkeypatch):
    signature = torch.cuda.graph.__init__.__code__.co_varnames
    assert {"pool", "stream", "capture_error_mode"} <= set(signature)
    fake, second = FakeCuda(monkeypatch), torch.device("cuda", 1)
    runtime = CudaRuntime(second)
    replay = runtime.capture(lambda: fake.log.append(("function", fake.current)))
    replay()
    runtime.wait()
    assert fake.log == [
        ("Stream", 1, second), ("Event", 1),
        ("CUDAGraph", 0), ("begin", 1, 0, "thread_local"), ("function", 1), ("end", 1),
        # These know their device.
        ("replay", 0), ("current_stream", 0, second), ("record", 0), ("synchronize", 0),
    ]  # fmt: skip
    assert fake.current == 0
    fake.log.clear()
    for _ in range(2):
        runtime.capture(lambda: None)
    runtime.forget()
    runtime.capture(lambda: None)
    # Graphs of one pool, until there is none left.
    assert [pool for name, _, pool, *_ in (x for x in fake.log if x[0] == "begin")] == [0, 0, 1]
