"""The state machines of support/paged_machine.py: block tables over pages that come and go."""

import pytest
from hypothesis import settings
from paged_machine import PagedFloat8Machine, PagedInt8Machine, PagedMachine

FEW = settings(
    max_examples=25, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPages = PagedMachine.TestCase
TestPages.settings = FEW
TestPagesOfInt8 = PagedInt8Machine.TestCase
TestPagesOfInt8.settings = settings(FEW, max_examples=10)
# The copies are those of int8; the conversion has separate tests.
TestPagesOfFloat8 = pytest.mark.full(PagedFloat8Machine.TestCase)
TestPagesOfFloat8.settings = settings(FEW, max_examples=10)
