"""Takes turns between tests that run at the same time in processes of pytest-xdist.

A test marked ``alone`` measures something that others would disturb, or waits for processes under a
time limit: while it runs, no other test of this run does. Without xdist that is always so.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """A place in the room: the whole room for ``alone``, else one of many places.

    The test that waits for a place holds the door, so that a test that needs the whole room is not
    overtaken forever by those that share it.
    """
    with open(folder / "room", "w") as room:
        with open(folder / "door", "w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def run_folder(request: pytest.FixtureRequest) -> Path:
    """A temporary folder that all processes of this run share."""
    base = request.getfixturevalue("tmp_path_factory").getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


def made_once(request: pytest.FixtureRequest, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make(folder)`` fills in one process of this run, for the tests in all."""
    base = run_folder(request)
    folder, finished = base / name, base / f"{name}.finished"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder
