"""Relay settings that must not change an answer, drawn at random."""

from hypothesis import strategies as st

from baton_engines import policies

OPTIONS = {
    "baton": {
        "max_prefill_tokens": st.integers(1, 40),
        "max_stall_tokens": st.none() | st.integers(1, 20),
        # The time of a forward of the small models, and times that none or any would exceed.
        "max_token_gap": st.sampled_from([None, 1e-9, 2e-3, 60.0]),
        "join": st.sampled_from(policies.baton.JOINS),
    },
    "chunked": {"token_budget": st.integers(1, 40)},
    "multi_bin": {
        "bins": st.integers(1, 4),
        "length": st.sampled_from(["max_new_tokens", "prompt"]),
        "batch_size": st.none() | st.integers(1, 4),
    },
    "orca": {},
    "padded_orca": {},
    "run_to_completion": {"max_prefill_tokens": st.integers(1, 40)},
}


@st.composite
def settings(draw, policy: str, capacity: int, bytes_per_token: int) -> dict:
    """Arguments of a Relay; the budget has room for at least one query of the whole capacity."""
    options = {name: draw(values) for name, values in OPTIONS[policy].items()}
    if options.get("join") == "never":
        options["max_token_gap"] = None
    made = policies.get(policy, admission=draw(st.sampled_from(policies.ADMISSIONS)), **options)
    num_slots = draw(st.integers(1, 4))
    aligned = not made.splits_prompts and draw(st.booleans())
    tokens = draw(st.none() | st.integers(capacity, 3 * capacity))
    return {
        "policy": made,
        "num_slots": num_slots,
        "max_slots": draw(st.none() | st.integers(num_slots, 6)),
        "aligned": aligned,
        "shaping": draw(st.sampled_from(["in_place", "concatenate"])) if aligned else "in_place",
        "kv_budget": None if tokens is None else tokens * bytes_per_token,
    }


def watch_budget(relay, budget: int | None) -> None:
    """Check at every change of the cache's shape that it is within the budget."""
    commit = relay.cache._commit

    def checked(planned):
        commit(planned)
        assert budget is None or relay.cache.bytes_in_use <= budget

    relay.cache._commit = checked
