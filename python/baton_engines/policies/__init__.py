"""Scheduling policies of the relay, by name."""

import inspect

from .admission import (
    ADMISSIONS,
    Admission,
    FirstCome,
    LengthAware,
    Priority,
    ShortestFirst,
    get_admission,
)
from .base import Policy
from .baton import Baton
from .chunked import Chunked
from .costs import Work
from .multi_bin import MultiBin
from .orca import Orca
from .padded_orca import PaddedOrca
from .plan import Forward, Plan, View
from .run_to_completion import RunToCompletion

_POLICIES = {
    policy.name: policy for policy in (Baton, Chunked, MultiBin, Orca, PaddedOrca, RunToCompletion)
}
NAMES = tuple(_POLICIES)

__all__ = [
    "ADMISSIONS",
    "NAMES",
    "Admission",
    "Baton",
    "Chunked",
    "FirstCome",
    "Forward",
    "LengthAware",
    "MultiBin",
    "Orca",
    "PaddedOrca",
    "Plan",
    "Policy",
    "Priority",
    "RunToCompletion",
    "ShortestFirst",
    "View",
    "Work",
    "get",
    "get_admission",
]


def get(name: str | Policy, **options) -> Policy:
    """A new policy with that name; an object that is already a policy is returned as it is.

    Args:
        name: one of `NAMES`.
        options: arguments of the policy's class.

    Raises:
        ValueError: no policy has that name, or the policy has no such option.
    """
    if isinstance(name, Policy):
        return name
    if name not in _POLICIES:
        raise ValueError(f"policies.get: name must be one of {', '.join(NAMES)}, got {name!r}")
    known = tuple(inspect.signature(_POLICIES[name]).parameters)
    for option in options:
        if option not in known:
            raise ValueError(
                f"policies.get: options of {name} must be {', '.join(known)}, got {option!r}"
            )
    return _POLICIES[name](**options)
