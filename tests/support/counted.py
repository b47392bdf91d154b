"""Counts of what state machines do; `scripts/soak.py operations` prints them."""

import collections
import functools

from hypothesis import stateful

# Name of a rule -> how often machines of this process have run it.
OPERATIONS: collections.Counter[str] = collections.Counter()
# Outcome of an operation -> how often, where the rule's name does not say it.
EVENTS: collections.Counter[str] = collections.Counter()


def rule(**strategies):
    """Hypothesis' `rule`, counted."""

    def decorate(function):
        @functools.wraps(function)
        def counted(self, **arguments):
            OPERATIONS[function.__name__] += 1
            return function(self, **arguments)

        return stateful.rule(**strategies)(counted)

    return decorate
