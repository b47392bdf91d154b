"""Where the prompts of newcomers are computed, by name; see `Relay`.

"serial": in the decode loop, between two steps. "overlapped": by a thread with cores of its own.
"apart": by other processes, which hand keys and values over in shared memory.
"""

from .base import Job, Prefiller, Worker
from .overlapped import Overlapped

NAMES = ("serial", "overlapped", "apart")

__all__ = ["NAMES", "Job", "Overlapped", "Prefiller", "Worker", "get"]


def get(mode: str | Prefiller, **options) -> Prefiller | None:
    """A new prefiller of that mode, None for "serial"; a prefiller is returned as it is.

    Args:
        mode: one of `NAMES`.
        options: arguments of the mode's class.

    Raises:
        ValueError: no mode has that name.
    """
    if isinstance(mode, Prefiller):
        return mode
    if mode == "serial":
        return None
    if mode == "overlapped":
        return Overlapped(**options)
    if mode == "apart":
        # Here and not above: it needs Linux.
        from .apart import Apart

        return Apart(**options)
    raise ValueError(f"prefill: mode must be one of {', '.join(NAMES)}, got {mode!r}")
