"""Orca: scheduling by iteration; a newcomer's prefill shares one packed forward with the decoders.

Selective batching as in the paper's text: all operations except attention treat the tokens of all
queries as one sequence, and attention is computed per query; nothing is padded. When a query is
admitted, memory is reserved for the keys and values of all tokens that it may ever have, so no
query is ever preempted.
Source: Orca (OSDI'22), sections 3 and 4.
"""

from .admission import Admission, get_admission
from .base import Policy, fitting
from .plan import Forward, Plan, View


class Orca(Policy):
    """Newcomers' whole prompts and one token of every other query in one forward.

    Args:
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "orca"

    def __init__(self, *, admission: str | Admission = "fcfs"):
        self.admission = get_admission(admission)

    def plan(self, view: View) -> Plan:
        """Fill every free row, then one forward for all."""
        order = self.admission.order(view)
        newcomers = fitting(view, order, view.num_free, reserve_all=True)
        prefill = tuple(
            (query, query.prompt_left) for query in (*view.running, *newcomers) if query.prompt_left
        )
        forward = Forward(prefill, decode=True, padded=self.pads and bool(prefill))
        return Plan(admit=newcomers, forwards=(forward,))
