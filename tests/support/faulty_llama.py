"""A FakeLlama whose forwards fail in the loop and in prefill processes, and counts of its faults.

Imports only what a prefill process needs: the model is sent there with its faults.
"""

import collections
import itertools
import os
import signal

from baton_engines.testing import FakeLlama

# A prompt that begins with POISON makes every forward raise; one with BAD has NaN logits as soon as
# there are more than six tokens. RAISE and DIE take effect in another process only.
RAISE, DIE, POISON, BAD = 46, 47, 48, 49

# Kind -> how many faults all machines of this process have injected; `make soak` prints them.
INJECTED: collections.Counter[str] = collections.Counter()


class FaultyLlama(FakeLlama):
    """Attributes:
    flaky: an iterator; for each forward of several rows, whether it fails this one time.
    """

    def __init__(self):
        super().__init__()
        self.flaky = itertools.repeat(False)
        self.fault = self.strike
        self.bad_row = self.is_bad
        self._home = os.getpid()

    def __getstate__(self):
        # Iterators cannot be pickled.
        return {**self.__dict__, "flaky": ()}

    def strike(self, rows):
        first = {tokens[0] for tokens in rows}
        if os.getpid() != self._home:
            if RAISE in first:
                raise ArithmeticError("mine")
            if DIE in first:
                os.kill(os.getpid(), signal.SIGKILL)
        elif POISON in first:
            INJECTED["forward"] += 1
            raise RuntimeError("poison")
        # A transient fault occurs where several rows could have caused it.
        elif len(rows) > 1 and next(self.flaky):
            INJECTED["forward, for now"] += 1
            raise MemoryError("for now")

    def is_bad(self, tokens):
        is_bad = tokens[0] == BAD and len(tokens) > 6
        INJECTED["logits"] += is_bad
        return is_bad
