"""Every op from several threads at once, in one library: each call has the bits of a single
call."""

import threading
from random import Random

import torch
from failing_memory_child import as_tuple, made
from hostile_calls import OPS

CALLERS, CALLS, ROUNDS = 4, 40, 5


def calls():
    """Valid calls of all ops, in some order: overload and the description of its arguments."""
    r = Random("threads")
    drawn = []
    for op, draw in OPS.items():
        for _ in range(max(CALLS // len(OPS), 1)):
            overload, described = draw(r)
            drawn.append((getattr(getattr(torch.ops.baton_kernels, op), overload), described))
    return [call for call in drawn if is_right(*call)]


def is_right(native, described):
    """A few of the drawn moves are invalid: a target in the source of another one."""
    try:
        outcome(native, described)
    except ValueError:
        return False
    return True


def outcome(native, described):
    """The results of the call and the tensors that it wrote."""
    arguments = made(described)
    results = as_tuple(native(**arguments))
    return [*results, *(x for x in arguments.values() if isinstance(x, torch.Tensor))]


def test_ops_from_several_threads_have_the_bits_of_one():
    drawn = calls()
    assert len(drawn) > CALLS // 2
    expected = [outcome(*call) for call in drawn]
    start, wrong = threading.Barrier(CALLERS), []

    def run(number):
        r = Random(number)
        torch.set_num_threads(1 + number % 3)
        start.wait()
        for _ in range(ROUNDS):
            for i in r.sample(range(len(drawn)), len(drawn)):
                pairs = zip(outcome(*drawn[i]), expected[i], strict=True)
                if not all(torch.equal(got, want) for got, want in pairs):
                    wrong.append((number, drawn[i][0]))

    callers = [threading.Thread(target=run, args=(number,)) for number in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(1)
    assert not wrong
