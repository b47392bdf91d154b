"""Run to completion: a batch is admitted when no row runs, and keeps its rows until all have ended.

The relay computes nothing for a finished row, whereas engines with static batches go on computing
padding in it. So this is the most favorable version of static batching: only the slots are lost.
"""

from ..query import Query
from .admission import Admission, get_admission
from .base import Policy, fitting, pack_prefills, positive
from .plan import Forward, Plan, View


class RunToCompletion(Policy):
    """One batch after the other; each runs until its last query ends.

    Args:
        max_prefill_tokens: the most prompt tokens that share a forward; bounds the memory of a
            prefill.
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "run_to_completion"

    def __init__(self, max_prefill_tokens: int = 2048, *, admission: str | Admission = "fcfs"):
        positive(self, max_prefill_tokens=max_prefill_tokens)
        self.max_prefill_tokens = max_prefill_tokens
        self.admission = get_admission(admission)

    def plan(self, view: View) -> Plan:
        """A new batch if nothing runs, then one decode step of all running queries."""
        newcomers: tuple[Query, ...] = ()
        if not view.running:
            order = self.admission.order(view)
            newcomers = fitting(view, order, view.num_slots, reserve_all=True)
        prefills = pack_prefills((*view.running, *newcomers), self.max_prefill_tokens)
        return Plan(admit=newcomers, forwards=(*prefills, Forward(decode=True)))
