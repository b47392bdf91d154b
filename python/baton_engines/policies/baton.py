"""BATON: newcomers prefill apart between two decode steps and join the next one.

A query enters as soon as a row is free, so a finished one never holds the batch up; the price is
that the running queries wait while a newcomer prefills. `max_stall_tokens` bounds it: at most that
many prompt tokens are computed between two decode steps, so a step is late by at most their time,
and the share of time that is lost to it is at most `p / (p + d)`, for p seconds of prefilling that
many tokens and d of a decode step.
Source: BATON (arXiv 2410.18701); the bound is ours.
"""

from ..query import Query
from .admission import Admission, get_admission
from .base import Policy, fitting, pack_chunks, positive
from .plan import Forward, Plan, View


class Baton(Policy):
    """Prefill apart, insert between two decode steps.

    Args:
        max_prefill_tokens: the most prompt tokens that newcomers share a forward with; bounds the
            memory of a prefill.
        max_stall_tokens: the most prompt tokens between two decode steps, None for all there are. A
            longer prompt comes in chunks, or whole and alone where prompts have to be whole: in an
            aligned cache and under dynamic RoPE. Prompts that are computed elsewhere stall nobody,
            and are not bounded.
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "baton"

    def __init__(
        self,
        max_prefill_tokens: int = 2048,
        max_stall_tokens: int | None = None,
        *,
        admission: str | Admission = "fcfs",
    ):
        positive(self, max_prefill_tokens=max_prefill_tokens)
        if max_stall_tokens is not None:
            positive(self, max_stall_tokens=max_stall_tokens)
        self.max_prefill_tokens = max_prefill_tokens
        self.max_stall_tokens = max_stall_tokens
        self.admission = get_admission(admission)

    def plan(self, view: View) -> Plan:
        """Fill free rows as far as the stall allows, then one decode step of all."""
        order = self.admission.order(view)
        candidates = fitting(view, order, view.num_free, reserve_all=False)
        room = None
        if not view.prefills_elsewhere and any(not query.prompt_left for query in view.running):
            room = self.max_stall_tokens
        chunks: list[tuple[Query, int]] = []
        for query in view.running:
            if query.prompt_left:
                room = self._take(query, room, chunks, view.whole_prompts)
        newcomers = []
        for query in candidates:
            # One that has nothing left to prefill only needs its row.
            if query.prompt_left:
                taken = len(chunks)
                room = self._take(query, room, chunks, view.whole_prompts)
                if len(chunks) == taken:
                    break
            newcomers.append(query)
        prefills = pack_chunks(chunks, self.max_prefill_tokens)
        return Plan(admit=tuple(newcomers), forwards=(*prefills, Forward(decode=True)))

    @staticmethod
    def _take(
        query: Query, room: int | None, chunks: list[tuple[Query, int]], whole: bool
    ) -> int | None:
        """Add what the room allows of the query's prompt; what is left of the room."""
        if room is None:
            chunks.append((query, query.prompt_left))
            return None
        count = min(query.prompt_left, room)
        if whole and count < query.prompt_left:
            count = 0 if chunks else query.prompt_left
        if count:
            chunks.append((query, count))
        return max(0, room - count)
