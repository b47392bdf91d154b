"""What a policy sees and what it says: the one interface between the relay and its scheduling.

Once per iteration the relay asks `Policy.plan` which queries give up their row, which waiting ones
enter, and which forwards compute what. The relay does as it is told and knows no policy by name:
prefill apart or in one forward with the decoders, padded or not, whole prompts or chunks, first
come first served or any other order, are all plans.
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
            parked keys, and for those whose beginning the prefix cache holds.
        running: queries with a row, in order of admission.
        num_slots: rows that there are.
        capacity: the most tokens of a row.
        bytes_in_use: of the cached keys and values of all rows.
        bytes_per_token: of one token's keys and values.
        now: clock seconds.
        kv_budget: the most bytes that `bytes_in_use` may ever be; None without a bound.
        whole_prompts: whether a prompt has to be computed in one forward: in an aligned cache no
            row can grow without the others, and dynamic RoPE goes by the length that the forward
            ends at.
        more_to_come: whether queries will be submitted yet, for which it may pay to wait.
        prefills_elsewhere: whether whole prompts of forwards without decoding are computed outside
            the loop while queries decode, so that nobody waits for them. A query stays `running`
            with its `prompt_left` meanwhile; planned again, it is not computed again.
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
        prefill: queries and how many tokens of their prompt are computed; all that is left of it
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
        park: running queries that leave their row and wait again, keys kept, nothing to be
            recomputed.
        admit: waiting queries that get a row, at most as many as are free once `park` is done.
        forwards: run one after the other. A query whose prompt is complete after one can decode in
            the next.
    """

    park: tuple[Query, ...] = ()
    admit: tuple[Query, ...] = ()
    forwards: tuple[Forward, ...] = ()
