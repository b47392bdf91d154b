"""Chunked prefill: decoders and chunks of prompts share a forward of a bounded number of tokens.

The decoders come first, then prompts that have been started, then newcomers, until the token budget
is used up: a forward takes about the same time regardless of arrivals.
Source: Sarathi-Serve (OSDI'24), stall-free batching; vLLM's scheduler.
"""

from .admission import Admission, get_admission
from .base import Policy, fitting, positive
from .plan import Forward, Plan, View


class Chunked(Policy):
    """Decode tokens and prefill chunks in one forward of at most `token_budget` tokens.

    Args:
        token_budget: the most tokens of a forward; exceeded only if there are more decoders.
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "chunked"
    splits_prompts = True

    def __init__(self, token_budget: int = 256, *, admission: str | Admission = "fcfs"):
        positive(self, token_budget=token_budget)
        self.token_budget = token_budget
        self.admission = get_admission(admission)

    def plan(self, view: View) -> Plan:
        """One forward; newcomers enter while it has room."""
        room = self.token_budget - sum(not query.prompt_left for query in view.running)
        # If the decoders use up the budget, prompts still advance by one token per forward.
        room = max(room, 1)
        chunks = []
        for query in view.running:
            count = min(query.prompt_left, room)
            if count:
                chunks.append((query, count))
                room -= count
        newcomers = []
        order = self.admission.order(view)
        for query in fitting(view, order, view.num_free, reserve_all=False):
            # A parked query that comes back decodes at once.
            count = min(query.prompt_left or 1, room)
            if not count:
                break
            newcomers.append(query)
            room -= count
            if query.prompt_left:
                chunks.append((query, count))
        forward = Forward(tuple(chunks), decode=True)
        return Plan(admit=tuple(newcomers), forwards=(forward,))
