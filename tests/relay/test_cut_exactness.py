"""Neither what joins a prompt in its forward nor where it is cut changes a bit of the query's
logits: `chunked` with any budget, down to one token, and `baton` with any costs and bounds, give
the logits of prompts that are computed whole and separately."""

import random

import pytest
import torch
from relay_workload import make_model
from transformers import LlamaForCausalLM

import baton_kernels
from baton_engines import policies
from baton_engines.relay import Relay
from baton_kernels.testing import available_cpu_isas, cpu_isa

CAPACITY = 760
# Prompts around the ends of a block of 64 keys and of a segment of 512; answers go past them.
PROMPTS = [(700, 30), (505, 20), (60, 12), (64, 3), (130, 8), (1, 70)]
CUTS = [
    *(("chunked", {"token_budget": budget}) for budget in (1, 7, 50, 300)),
    ("baton", {}),
    ("baton", {"max_token_gap": 1e-9}),
    ("baton", {"max_stall_tokens": 33}),
    ("baton", {"costs": lambda work: 1.0 + work.tokens, "max_token_gap": 80.0}),
    ("baton", {"costs": lambda work: 1.0 + work.tokens / 100}),
]


SIZES = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 32,
    "max_position_embeddings": 1024,
}  # fmt: skip


def logits_of(model: LlamaForCausalLM, policy: policies.Policy, num_slots: int) -> list:
    """Per query: the logits of all of its tokens."""
    generator = random.Random(0)
    logits: dict[int, list[torch.Tensor]] = {}
    with Relay(model, num_slots, CAPACITY, policy=policy) as relay:
        relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(
            row.clone()
        )
        queries = [
            relay.submit([generator.randrange(131) for _ in range(length)], max_new_tokens=count)
            for length, count in PROMPTS
        ]
        relay.run()
    assert all(len(query.tokens) == query.max_new_tokens for query in queries)
    return [torch.stack(logits[query.id]) for query in queries]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
USED = baton_kernels.build_info()["cpu"]["isa_used"]
# The instruction set that is chosen here runs both dtypes, the others one each, in turns.
CASES = [
    pytest.param(
        dtype, isa, id=f"{name}-{isa}",
        marks=[pytest.mark.full] if number % 2 == turn and isa != USED else [],
    )
    for number, isa in enumerate(available_cpu_isas())
    for turn, (name, dtype) in enumerate(DTYPES.items())
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "isa"), CASES)
def test_bits_are_those_of_prompts_apart(dtype, isa):
    model = make_model(dtype, **SIZES)
    with cpu_isa(isa):
        expected = logits_of(model, policies.get("baton", join="never"), 3)
        assert len({tuple(x[0].tolist()) for x in expected}) == len(PROMPTS)
        for name, options in CUTS if isa == USED else CUTS[::2]:
            policy = policies.get(name, **options)
            for query, (got, want) in enumerate(
                zip(logits_of(model, policy, 3), expected, strict=True)
            ):
                assert got.dtype == want.dtype
                assert torch.equal(got, want), f"query {query} under {name} with {options}"
