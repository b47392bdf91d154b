"""Helpers for processes that tests have started."""

import time
from collections.abc import Callable

import psutil


def children() -> set[psutil.Process]:
    """Child processes of this one, and theirs."""
    return set(psutil.Process().children(recursive=True))


def alive(process: int) -> bool:
    """Whether it has not ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool], otherwise: str, seconds: float = 60) -> None:
    """Wait until a condition holds; fail instead of waiting forever."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(otherwise)
        time.sleep(0.05)
