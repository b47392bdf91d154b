"""Chooses the threads that the CPU's ops run on."""

from __future__ import annotations

from baton_kernels._library import ops


def use_torch_threads(use: bool = True) -> None:
    """Runs the CPU's ops of this process on the threads of torch's operators.

    By default the ops have separate threads, which is best where little else computes: they sleep
    soon, and no op waits for a thread that the system has descheduled. torch's threads spin for
    milliseconds after each operator. Where operators of torch run between the ops, as in the layers
    of an engine, both would compete for the same cores; on torch's threads they take turns. An op
    whose caller is bound to one core always does so, because new threads would inherit the core.

    Results have the same bits. torch's threads do not survive a fork; the ops' own do.

    Args:
        use: False goes back to the ops' own threads.
    """
    ops.use_torch_threads(use)
