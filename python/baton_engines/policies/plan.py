"""The interface between the relay and its scheduling: what a policy sees and what it answers.

Once per iteration the relay asks `Policy.plan` which queries give up their row, which waiting
queries enter, and which forwards compute what. The relay follows the plan and treats all policies
alike: separate prefills or joint forwards, padding or none, whole prompts or chunks, first come
first served or any other order are all expressed as plans.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from ..query import Query


@dataclass(frozen=True)
class View:
    """The relay between two iterations; for reading, and only until `plan` returns.

    Attributes:
        waiting: queries without a row, in order of submission; `query.cached` > 0 for those with
            parked keys, and for those whose beginning is in the prefix cache.
        running: queries with a row, in order of admission.
        num_slots: the number of rows.
        capacity: the most tokens of a row.
        bytes_in_use: bytes of the cached keys and values in all rows.
        bytes_per_token: bytes of one token's keys and values.
        now: clock seconds.
        kv_budget: the upper limit of `bytes_in_use`; None without a limit.
        whole_prompts: whether a prompt has to be computed in one forward: in an aligned cache no
            row can grow without the others, and dynamic RoPE depends on the length at which a
            forward ends.
        more_to_come: whether more queries will be submitted, so that waiting may pay off.
        prefills_elsewhere: whether whole prompts of forwards without decoding are computed outside
            the loop while queries decode, so that no query waits for them. Meanwhile a query stays
            `running` with its `prompt_left`; planning it again does not compute it again.
    """

    waiting: Collection[Query]
    running: Collection[Query]
    num_slots: int
    capacity: int
    bytes_in_use: int
    bytes_per_token: int
    now: float
    kv_budget: int | None = None
    whole_prompts: bool = False
    more_to_come: bool = False
    prefills_elsewhere: bool = False

    @property
    def num_free(self) -> int:
        """Rows without a query."""
        return self.num_slots - len(self.running)


class Forward(NamedTuple):
    """One run of the model.

    Attributes:
        prefill: queries and how many tokens of their prompts are computed; everything that is left
            if the view says `whole_prompts`.
        decode: whether every running query whose prompt is complete computes its next token.
        padded: whether every row is padded to the number of tokens of the longest one; needs a
            policy that `pads`.
    """

    prefill: tuple[tuple[Query, int], ...] = ()
    decode: bool = False
    padded: bool = False


class Plan(NamedTuple):
    """One iteration.

    Attributes:
        park: running queries that leave their row and wait again; their keys are kept, and nothing
            is recomputed.
        admit: waiting queries that get a row, at most as many as are free once `park` is done.
        forwards: run one after the other. A query whose prompt is completed by one can decode in
            the next.
    """

    park: tuple[Query, ...] = ()
    admit: tuple[Query, ...] = ()
    forwards: tuple[Forward, ...] = ()
