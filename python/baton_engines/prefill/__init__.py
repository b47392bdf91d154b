"""The places where newcomers' prompts can be computed, by name; see `Relay`.

"serial": in the decode loop, between two steps. "overlapped": in a thread with separate cores.
"apart": in other processes, which hand keys and values over in shared memory. "ray": in actors of
Ray, possibly on other machines.
"""

from .base import Job, Prefilled, Prefiller, Worker
from .overlapped import Overlapped
from .serial import Serial

NAMES = ("serial", "overlapped", "apart", "ray")

__all__ = ["NAMES", "Job", "Overlapped", "Prefilled", "Prefiller", "Serial", "Worker", "get"]


def get(mode: str | Prefiller, **options) -> Prefiller:
    """A new prefiller for that mode; a prefiller is returned as it is.

    Args:
        mode: one of `NAMES`.
        options: arguments of the mode's class; "serial" takes none.

    Raises:
        ValueError: no mode has that name.
    """
    if isinstance(mode, Prefiller):
        return mode
    if mode == "serial":
        return Serial(**options)
    if mode == "overlapped":
        return Overlapped(**options)
    if mode == "apart":
        # Imported only here, because it needs Linux.
        from .apart import Apart

        return Apart(**options)
    if mode == "ray":
        # It needs the package ray.
        from .ray import Remote

        return Remote(**options)
    raise ValueError(f"prefill.get: mode must be one of {', '.join(NAMES)}, got {mode!r}")
