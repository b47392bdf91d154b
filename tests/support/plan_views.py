"""Inputs of a policy, made by hand: queries as a relay would have them, and its view."""

from baton_engines.policies import View
from baton_engines.query import Query


def make_query(id: int, prompt: int, cached: int = 0, tokens: int = 0, count: int = 20) -> Query:
    query = Query(id, 0.0)
    query.prompt, query.cached, query.tokens = [1] * prompt, cached, [1] * tokens
    query.max_new_tokens = count
    return query


def make_decoder(id: int, prompt: int = 3) -> Query:
    return make_query(id, prompt, cached=prompt + 1, tokens=2)


def view(waiting=(), running=(), num_slots=4, budget=None, **changes) -> View:
    # Eight bytes per token; the budget here is in tokens.
    budget = None if budget is None else 8 * budget
    return View(waiting, running, num_slots, 100, 0, 8, 0.0, budget, **changes)
