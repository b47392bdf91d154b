"""The state machines of support/cache_machines.py, and the same on emulated kernels."""

import pytest
import torch
from cache_machine import KVCacheMachine
from cache_machines import (
    AlignedFloat8Machine,
    AlignedMachine,
    EightBitMachine,
    HalfAlignedMachine,
)
from hypothesis import settings

from baton_kernels import kv_cache
from emulation.cuda.backends import EMULATED


class EmulatedMachine(KVCacheMachine):
    """The cache and its user on emulated CUDA kernels."""

    ops = EMULATED["cuda-emulated"]
    dtype = torch.float16
    head_dim = 64

    def __init__(self):
        self.patch = pytest.MonkeyPatch()
        for op in ("insert_kv", "extract_kv", "move_kv"):
            self.patch.setattr(kv_cache, op, getattr(self.ops, op))
        self.ops.module.set_options(*self.ops.schedule)
        super().__init__()

    def teardown(self):
        self.patch.undo()


class JudgedMachine(EmulatedMachine):
    """Every access is checked, with lanes and blocks in another order."""

    ops = EMULATED["cuda-judged"]
    aligned = True
    dtype = torch.float32
    head_dim = 16


MANY = settings(
    max_examples=80, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestRagged = KVCacheMachine.TestCase
TestRagged.settings = MANY
TestAligned = AlignedMachine.TestCase
TestAligned.settings = MANY
TestEmulated = pytest.mark.slow(EmulatedMachine.TestCase)
TestEmulated.settings = settings(MANY, max_examples=40)
TestJudged = pytest.mark.slow(JudgedMachine.TestCase)
TestJudged.settings = settings(MANY, max_examples=20)
TestHalfAligned = HalfAlignedMachine.TestCase
TestHalfAligned.settings = settings(MANY, max_examples=20)
TestEightBit = EightBitMachine.TestCase
TestEightBit.settings = settings(MANY, max_examples=15)
TestAlignedFloat8 = AlignedFloat8Machine.TestCase
TestAlignedFloat8.settings = settings(MANY, max_examples=15)
