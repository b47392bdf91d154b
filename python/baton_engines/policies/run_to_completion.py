"""Run to completion: a batch is admitted when no row runs, and keeps its rows until all ended.

The relay computes nothing for a finished row, where engines with a static batch go on computing
padding in it, so this is the kindest version of what it stands for: only the slots are lost.
"""

from itertools import islice

from .base import Forward, Plan, Policy, View, pack_prefills


class RunToCompletion(Policy):
    """One batch after the other, each until its last query ends.

    Args:
        max_prefill_tokens: the most prompt tokens that share a forward; bounds the memory of a
            prefill.
    """

    name = "run_to_completion"

    def __init__(self, max_prefill_tokens: int = 2048):
        self.max_prefill_tokens = max_prefill_tokens

    def plan(self, view: View) -> Plan:
        """A new batch if nothing runs, then one decode step of all."""
        newcomers = () if view.running else tuple(islice(view.waiting, view.num_slots))
        prefills = pack_prefills((*view.running, *newcomers), self.max_prefill_tokens)
        return Plan(admit=newcomers, forwards=(*prefills, Forward(decode=True)))
