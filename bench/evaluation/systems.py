"""The systems that are compared: one relay each, all on the same kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baton_engines import policies
from baton_engines.relay import Relay


@dataclass(frozen=True)
class System:
    """A relay with a name.

    Attributes:
        name: in tables and on the command line.
        policy: the policy's name.
        says: its description, for a reader who knows none of the systems.
        policy_options: for the policy's class.
        relay_options: for the relay.
    """

    name: str
    policy: str
    says: str
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    relay_options: Mapping[str, Any] = field(default_factory=dict)

    def relay(self, model: Any, num_slots: int, capacity: int) -> Relay:
        """A new relay of this system."""
        policy = policies.get(self.policy, **self.policy_options)
        return Relay(model, num_slots, capacity, policy, **self.relay_options)


# How the paper handles prompts.
APART = {"join": "never"}
# In the order of presentation: from what is widely known to what is new.
SYSTEMS = {
    system.name: system
    for system in (
        System(
            "run_to_completion",
            "run_to_completion",
            "a batch keeps its slots until its longest query has ended",
        ),
        System(
            "multi_bin",
            "multi_bin",
            "the same, but only queries of like answer length share a batch; it is told the true "
            "lengths",
        ),
        System(
            "padded_orca",
            "padded_orca",
            "newcomers enter at every step; their prompts share a forward with the others, all "
            "rows padded to the longest",
        ),
        System(
            "orca",
            "orca",
            "Orca as published: newcomers' prompts and the others' tokens packed in one forward, "
            "no padding",
        ),
        System(
            "chunked",
            "chunked",
            "as Sarathi and vLLM: prompts in chunks, packed with the others' tokens under a "
            "budget of tokens per forward",
        ),
        System(
            "baton_concat",
            "baton",
            "BATON the naive way: every insertion and removal concatenates and pads the whole "
            "cache",
            APART,
            {"aligned": True, "shaping": "concatenate"},
        ),
        System(
            "baton_aligned",
            "baton",
            "BATON as in the paper: newcomers prefill between two steps, rows end in one column, "
            "only what must move is moved",
            APART,
            {"aligned": True},
        ),
        System(
            "baton_never",
            "baton",
            "the same, but rows end anywhere and nothing moves",
            APART,
        ),
        System(
            "baton",
            "baton",
            "ours: newcomers' prompts join the others' forward, in chunks that pay by the costs "
            "that it has seen",
        ),
        System(
            "baton_overlapped",
            "baton",
            "prompts are computed by a thread on half of the cores while the others decode",
            relay_options={"prefill": "overlapped"},
        ),
        System(
            "baton_apart",
            "baton",
            "the same by another process, as a second device would",
            relay_options={"prefill": "apart"},
        ),
    )
}
# The system whose answers all others are compared with.
REFERENCE = "baton"
# The systems that speed is given as a ratio to.
BASELINES = ("run_to_completion", "orca")
