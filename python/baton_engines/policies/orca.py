"""Orca: scheduling by iteration, a newcomer's prefill shares one packed forward with the decoders.

Selective batching as in the paper's text: the tokens of all queries lie one after the other for
everything but attention, which is each query's own; nothing is padded. Keys and values of all the
tokens that a query may ever have are reserved when it is admitted, so none is ever preempted.
Source: Orca (OSDI'22), sections 3 and 4.
"""

from .admission import Admission, get_admission
from .base import Policy, fitting
from .plan import Forward, Plan, View


class Orca(Policy):
    """Whole prompts of newcomers and one token of every other query in one forward.

    Args:
        admission: one of `ADMISSIONS`, or an `Admission`.
    """

    name = "orca"

    def __init__(self, *, admission: str | Admission = "fcfs"):
        self.admission = get_admission(admission)

    def plan(self, view: View) -> Plan:
        """Fill every free row, then one forward of all."""
        order = self.admission.order(view)
        newcomers = fitting(view, order, view.num_free, reserve_all=True)
        prefill = tuple(
            (query, query.prompt_left) for query in (*view.running, *newcomers) if query.prompt_left
        )
        forward = Forward(prefill, decode=True, padded=self.pads and bool(prefill))
        return Plan(admit=newcomers, forwards=(forward,))
