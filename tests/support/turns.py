"""Turns of tests that run at the same time, each in a process of pytest-xdist.

A test that is marked ``alone`` measures what others would disturb, or waits for processes under a
time limit: while it runs, no other test of this run does. Without xdist it does so anyway.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """A place in the room: all of it for ``alone``, else one of many.

    The door is held by whoever waits for a place, so that a test that needs the whole room is not
    overtaken forever by those that share it.
    """
    with open(folder / "room", "w") as room:
        with open(folder / "door", "w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
