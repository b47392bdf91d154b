"""The bound of `bench.simulate`: by hand, and that no policy exceeds it."""

from functools import partial

import pytest
from bench_package import import_bench

from baton_engines import policies

bound = import_bench("studies.simulate.bound")
costs = import_bench("studies.simulate.costs")
system = import_bench("studies.simulate.system")
workloads = import_bench("workloads")


class Machine:
    """A forward takes at least a second; from 10 tokens on, it takes a tenth per token."""

    bytes_per_token = 1

    def forward(self, work):
        return costs.Cost(max(1.0, 0.1 * work.tokens))

    def copy(self, num_bytes):
        return 0.0


def test_by_hand():
    # Six rows leave room for four prompt tokens in a forward that takes a second anyway: at 4 / 6
    # of a prompt token per output token they are free. Computed separately, a prompt token takes a
    # tenth.
    assert bound.least_seconds(Machine(), 0.5, 6, 0) == pytest.approx(1 / 6, rel=1e-3)
    assert bound.least_seconds(Machine(), 0.5, 6, 0, apart=True) == pytest.approx(1 / 6 + 0.05)
    # If arithmetic is the limit, nothing is gained.
    assert bound.least_seconds(Machine(), 9.0, 32, 0) == pytest.approx(1.0, rel=1e-3)
    assert bound.least_seconds(Machine(), 9.0, 32, 0, apart=True) == pytest.approx(1.0, rel=1e-3)
    assert bound.bound_by_compute(Machine()) == 15


@pytest.mark.parametrize("slots", [4, 16])
def test_no_policy_is_above_it(slots):
    requests = workloads.orca(60, divisor=4)
    prompts = sum(one.prompt_tokens for one in requests)
    # The first token of a query comes from its prompt.
    outputs = sum(one.output_tokens - 1 for one in requests)
    least = outputs * bound.least_seconds(Machine(), prompts / outputs, slots, 0)
    for name, options in (("baton", {}), ("baton", {"join": "never"}), ("orca", {})):
        made = partial(policies.get, name, **options)
        taken = system.simulate(system.System(Machine(), made, slots), requests).seconds
        assert taken >= 0.999 * least


def test_the_report_says_where_it_pays():
    text = bound.report("H100, llama-7b", costs.roofline("H100", "llama-7b"), 200)
    assert len(text.splitlines()) == 3 + len(bound.SLOTS)
    assert all(float(word) >= 0.999 for word in text.splitlines()[3].split()[1:6])
