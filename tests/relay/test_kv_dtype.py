"""A relay with eight-bit keys and values: a query gets the same answer, bit by bit, in any batch,
parked and resumed, behind a reused prefix and with copies of its prompt."""

import pytest
import torch

from baton_engines import Relay
from baton_engines.huggingface import AnyModel
from baton_engines.testing.small_llama import small_llama
from baton_kernels.testing import assert_same_bits

STORED = pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
CAPACITY = 72


@pytest.fixture(scope="module")
def model():
    return small_llama(max_position_embeddings=128)


def prompts():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, 97, (40,), generator=generator).tolist()
    return [
        (shared if i % 3 else []) + torch.randint(0, 97, (3 + i,), generator=generator).tolist()
        for i in range(8)
    ]


def watch(relay):
    logits = {}
    relay._batch.on_logits = lambda query, x: logits.setdefault(query.id, []).append(x.clone())
    return logits


def alone(model, kv_dtype):
    """Tokens and logits of every prompt in a relay with one slot."""
    answers = []
    for prompt in prompts():
        with Relay(model, 1, CAPACITY, kv_dtype=kv_dtype) as relay:
            logits = watch(relay)
            query = relay.submit(prompt, max_new_tokens=9)
            relay.run()
            answers.append((query.tokens, torch.stack(logits[query.id])))
    return answers


@STORED
@pytest.mark.parametrize("options", [
    {}, {"policy": "chunked"}, {"policy": "run_to_completion"}, {"policy": "padded_orca"},
    {"aligned": True}, {"aligned": True, "shaping": "concatenate"}, {"prefix_cache": 1 << 20},
    {"kv_budget": 40_000},
], ids=str)  # fmt: skip
def test_an_answer_is_the_one_alone(model, options, kv_dtype):
    expected = alone(model, kv_dtype)
    if options.get("policy") == "padded_orca":
        # Its prompts are computed with padding, with another order in matrix products.
        expected = [(tokens, None) for tokens, _ in expected]
    with Relay(model, 3, CAPACITY, kv_dtype=kv_dtype, **options) as relay:
        logits = watch(relay)
        queries = [relay.submit(prompt, max_new_tokens=9) for prompt in prompts()]
        for step in range(400):
            if not relay.step():
                break
            if step == 4:
                relay.resize(5)
            if step == 6:
                query = next(query for query in queries if query.status == "running")
                relay.preempt(query)
                relay.resume(query)
        for query, (tokens, wanted) in zip(queries, expected, strict=True):
            assert query.status == "finished" and query.tokens == tokens
            if wanted is not None:
                assert_same_bits(torch.stack(logits[query.id]), wanted)
        assert relay._batch.slots.cache.keys.dtype == kv_dtype
        if "prefix_cache" in options:
            assert relay._batch.slots.reused_tokens > 0


@STORED
def test_copies_of_a_prompt(model, kv_dtype):
    prompt = prompts()[1]
    with Relay(model, 3, CAPACITY, kv_dtype=kv_dtype) as relay:
        queries = relay.submit_n(prompt, 3, max_new_tokens=9, temperature=0.7, seed=3)
        relay.run()
    for query, seed in zip(queries, (3, 4, 5), strict=True):
        with Relay(model, 1, CAPACITY, kv_dtype=kv_dtype) as relay:
            one = relay.submit(prompt, max_new_tokens=9, temperature=0.7, seed=seed)
            relay.run()
        assert query.tokens == one.tokens


def test_eight_bits_are_near_the_model_and_smaller(model):
    with Relay(model, 1, CAPACITY) as floats, Relay(model, 1, CAPACITY, kv_dtype="int8") as bits:
        found = [watch(relay) for relay in (floats, bits)]
        for relay in (floats, bits):
            relay.submit(prompts()[1], max_new_tokens=1)
            relay.run()
        (a,), (b,) = (next(iter(logits.values())) for logits in found)
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()
        sizes = [relay._batch.slots.cache.bytes_per_token for relay in (floats, bits)]
        assert sizes[1] * 64 == sizes[0] * 20


@pytest.mark.parametrize("kv_dtype", ["int4", torch.float32, torch.float16, 8])
def test_other_types_are_refused(model, kv_dtype):
    if kv_dtype == torch.float32:
        # The model's own.
        Relay(model, 1, CAPACITY, kv_dtype=kv_dtype).close()
        return
    error = NotImplementedError if isinstance(kv_dtype, torch.dtype) else ValueError
    with pytest.raises(error, match="dtype must be"):
        Relay(model, 1, CAPACITY, kv_dtype=kv_dtype)


def test_prompts_computed_elsewhere_are_refused(model):
    with pytest.raises(NotImplementedError, match="Relay: prefill must be 'serial' with kv_dtype"):
        Relay(model, 1, CAPACITY, kv_dtype="int8", prefill="overlapped")


def test_other_models_are_refused(model):
    with AnyModel(model) as handle, pytest.raises(NotImplementedError, match="dtype must be"):
        Relay(handle, 1, CAPACITY, kv_dtype="int8")
