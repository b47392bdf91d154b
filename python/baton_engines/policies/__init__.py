"""Scheduling policies of the relay, by name."""

from .base import Forward, Plan, Policy, View
from .baton import Baton
from .run_to_completion import RunToCompletion

_POLICIES = {policy.name: policy for policy in (Baton, RunToCompletion)}
NAMES = tuple(_POLICIES)

__all__ = ["NAMES", "Baton", "Forward", "Plan", "Policy", "RunToCompletion", "View", "get"]


def get(name: str | Policy, **options) -> Policy:
    """A new policy of that name; an object that is a policy already is returned as it is.

    Args:
        name: one of `NAMES`.
        options: arguments of the policy's class.

    Raises:
        ValueError: no policy has that name.
    """
    if isinstance(name, Policy):
        return name
    if name not in _POLICIES:
        raise ValueError(f"get: name must be one of {', '.join(NAMES)}, got {name!r}")
    return _POLICIES[name](**options)
