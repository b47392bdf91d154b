"""Which threads the CPU's ops run on."""

from __future__ import annotations

from baton_kernels._library import ops


def use_torch_threads(use: bool = True) -> None:
    """Runs the CPU's ops of this process on the threads of torch's operators.

    The ops have threads of their own, which is best where little else computes: they sleep soon,
    and nothing waits for one that the system has put aside. torch's threads spin for milliseconds
    after each operator. Where operators of torch stand between the ops, as in the layers of an
    engine, both would want the same cores; on torch's threads they take turns. So does every op
    whose caller is bound to one core, for threads of its own would inherit that.

    Results have the same bits. torch's threads do not survive a fork; the ops' own do.

    Args:
        use: False goes back to the ops' own threads.
    """
    ops.use_torch_threads(use)
