"""BATON: newcomers prefill apart between two decode steps and join the next one.

A query enters as soon as a row is free, so a finished one never holds the batch up; the price is
that the running queries wait while a newcomer prefills.
Source: BATON (arXiv 2410.18701), with first come first served admission.
"""

from itertools import islice

from .base import Forward, Plan, Policy, View, pack_prefills


class Baton(Policy):
    """Prefill apart, insert between two decode steps.

    Args:
        max_prefill_tokens: the most prompt tokens that newcomers share a forward with; bounds the
            memory of a prefill.
    """

    name = "baton"

    def __init__(self, max_prefill_tokens: int = 2048):
        self.max_prefill_tokens = max_prefill_tokens

    def plan(self, view: View) -> Plan:
        """Fill every free row, then one decode step of all."""
        newcomers = tuple(islice(view.waiting, view.num_free))
        prefills = pack_prefills((*view.running, *newcomers), self.max_prefill_tokens)
        return Plan(admit=newcomers, forwards=(*prefills, Forward(decode=True)))
