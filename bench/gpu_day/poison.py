"""A pytest plugin: a process whose GPU no longer responds runs no further tests.

After an illegal access, every later call of the process fails, and so would every later test. With
pytest-xdist the worker ends and is replaced; without it the run stops.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from .exits import is_broken

EXIT_CODE = 71


class Poison:
    """Checks the device after every failed test."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, object, object]:
        report = yield
        self.failed = self.failed or report.failed
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Runs after the reports of a test have been sent."""
        if not self.failed:
            return
        self.failed = False
        if not is_broken():
            return
        if hasattr(self.config, "workerinput"):
            os._exit(EXIT_CODE)
        pytest.exit("the GPU no longer answers this process", returncode=EXIT_CODE)


def pytest_configure(config: pytest.Config) -> None:
    # With xdist, the controller itself runs no tests.
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Poison(config), "baton-poison")
