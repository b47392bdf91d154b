"""Rules on logits, each compared with the logits processor that `generate` would use."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from baton_engines import Relay
from baton_engines.query.generation_defaults import GenerationDefaults
from baton_engines.query.logit_rules import LogitRules, apply_rules
from baton_engines.query.sampler import Sampler
from baton_engines.query.sampling import candidates, choose
from baton_engines.query.sampling_options import SamplingOptions, make_options
from baton_engines.testing import FakeLlama
from baton_engines.testing.small_llama import small_llama

VOCAB = 97
PROMPT = [5, 6, 7, 7, 90]
ANSWER = [8, 7, 8, 8, 1]
EOS = [1, 2]


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def ruled(options: SamplingOptions, answer=ANSWER, prompt=PROMPT) -> torch.Tensor:
    scores = logits_of(1)
    rules = LogitRules.of(options, prompt, EOS)
    if rules is not None:
        apply_rules([rules], [answer], scores)
    return scores


PROCESSORS = {
    "repetition_penalty": (1.7, lambda v: RepetitionPenaltyLogitsProcessor(v)),
    "repetition_penalty below 1": (0.6, lambda v: RepetitionPenaltyLogitsProcessor(v)),
    "suppress_tokens": ((3, 90, 7), lambda v: SuppressTokensLogitsProcessor(list(v))),
    "logit_bias": (
        ((3, 2.5), (7, -8.0)),
        lambda v: SequenceBiasLogitsProcessor({(id,): bias for id, bias in v}),
    ),
    "min_new_tokens": (
        6,
        lambda v: MinNewTokensLengthLogitsProcessor(len(PROMPT), v, EOS, device="cpu"),
    ),
    "min_new_tokens reached": (
        5,
        lambda v: MinNewTokensLengthLogitsProcessor(len(PROMPT), v, EOS, device="cpu"),
    ),
    "begin_suppress_tokens": (
        (3, 90),
        lambda v: SuppressTokensAtBeginLogitsProcessor(list(v), len(PROMPT)),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("answer", [ANSWER, []], ids=["some", "none"])
def test_a_rule_is_that_of_transformers(name, answer):
    value, make = PROCESSORS[name]
    ids = torch.tensor([[*PROMPT, *answer]])
    expected = make(value)(ids, logits_of(1).clone())
    actual = ruled(SamplingOptions(**{name.split()[0]: value}), answer)
    assert torch.equal(actual, expected)
    changed = not torch.equal(expected, logits_of(1))
    assert changed == (name != "min_new_tokens reached" or not answer) or (
        name == "begin_suppress_tokens" and bool(answer)
    )


def test_frequency_and_presence_penalties_worked_out():
    """Counts in the answer only: token 8 three times, 7 and 1 once."""
    expected = logits_of(1)
    for token, count in {8: 3, 7: 1, 1: 1}.items():
        expected[0, token] -= 0.5 * count
    torch.testing.assert_close(ruled(SamplingOptions(frequency_penalty=0.5)), expected)
    expected = logits_of(1)
    expected[0, [8, 7, 1]] -= 0.25
    torch.testing.assert_close(ruled(SamplingOptions(presence_penalty=0.25)), expected)
    assert torch.equal(ruled(SamplingOptions(frequency_penalty=0.5), []), logits_of(1))


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_is_that_of_transformers(min_p, temperature):
    logits = logits_of(1)
    expected = torch.softmax(MinPLogitsWarper(min_p)(None, logits / temperature), dim=-1)[0]
    options = SamplingOptions(temperature=temperature, min_p=min_p)
    ids, probabilities = candidates(logits[0], options)
    found = torch.zeros(VOCAB).index_put((ids,), probabilities.float())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(found > 0, expected > 0)


ALL = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.2,
    "presence_penalty": -0.3,
    "logit_bias": ((3, 2.0), (8, 1.0)),
    "suppress_tokens": (4, 5),
    "begin_suppress_tokens": (9,),
    "min_new_tokens": 4,
}
MIXTURE = [
    {},
    ALL,
    {"repetition_penalty": 1.9},
    {"temperature": 0.8, "top_k": 7, **ALL},
    {"logit_bias": ((1, 9.0),)},
    {"temperature": 1.5},
    {"frequency_penalty": 1.0, "temperature": 1.0, "top_p": 0.7},
]


def test_rows_together_have_the_bits_of_rows_alone():
    logits = logits_of(len(MIXTURE), seed=3)
    answers = [list(range(row, row + 3 * row)) for row in range(len(MIXTURE))]
    before = logits.clone()

    def samplers():
        return [
            Sampler(SamplingOptions(**options), seed, PROMPT, EOS)
            for seed, options in enumerate(MIXTURE)
        ]

    together = choose(samplers(), answers, logits)
    assert torch.equal(logits, before)
    for row, sampler in enumerate(samplers()):
        assert choose([sampler], [answers[row]], logits[row : row + 1]) == [together[row]]
    rules = [LogitRules.of(SamplingOptions(**ALL), PROMPT, EOS) for _ in answers]
    apply_rules(rules, answers, logits)
    for row, answer in enumerate(answers):
        alone = before[row : row + 1].clone()
        apply_rules([LogitRules.of(SamplingOptions(**ALL), PROMPT, EOS)], [answer], alone)
        assert torch.equal(alone[0], logits[row])


def test_counts_follow_a_growing_answer():
    """Rules keep their counts; a long answer outgrows the initial storage."""
    rules = LogitRules.of(SamplingOptions(**ALL), PROMPT, EOS)
    answer = torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(4)).tolist()
    for length in (0, 1, 2, 150, 300):
        grown, fresh = logits_of(1), logits_of(1)
        apply_rules([rules], [answer[:length]], grown)
        again = LogitRules.of(SamplingOptions(**ALL), PROMPT, EOS)
        apply_rules([again], [answer[:length]], fresh)
        assert torch.equal(grown, fresh)
        # A repeated step counts nothing twice.
        grown = logits_of(1)
        apply_rules([rules], [answer[:length]], grown)
        assert torch.equal(grown, fresh)


# Against generate


GENERATE = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "suppress_tokens": {"suppress_tokens": [3, 10, 50]},
    "min_new_tokens": {"min_new_tokens": 9},
    "min_length": {"min_length": 11},
    "sequence_bias": {"sequence_bias": [[[12], 4.0], [[40], -3.0]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(60))},
    "all": {"repetition_penalty": 1.2, "suppress_tokens": [3], "min_new_tokens": 5},
}


def generated(model, prompt, count, **options):
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


# Only a generation config can set these.
OF_CONFIGS = ("min_length", "begin_suppress_tokens")


@pytest.mark.parametrize(
    ("given_by", "name"),
    [("config", name) for name in GENERATE]
    + [("query", name) for name in GENERATE if name not in OF_CONFIGS],
)
def test_answers_are_those_of_generate(name, given_by):
    # Most of the vocabulary ends an answer, so that min_new_tokens matters.
    model = small_llama(max_position_embeddings=64, eos_token_id=list(range(30, 70)))
    model.generation_config = GenerationConfig(
        eos_token_id=list(range(30, 70)), **(GENERATE[name] if given_by == "config" else {})
    )
    options = dict(GENERATE[name]) if given_by == "query" else {}
    if "sequence_bias" in options:
        options["logit_bias"] = {ids[0]: bias for ids, bias in options.pop("sequence_bias")}
    prompts = [[5, 6, 7, 7], [1], [9, 9, 8, 3, 2, 2]]
    if name in OF_CONFIGS:
        prompts = prompts[:1] + prompts[2:]
    with Relay(model, 3, 32) as relay:
        queries = [relay.submit(prompt, max_new_tokens=14, **options) for prompt in prompts]
        relay.run()
    told = GENERATE[name] if given_by == "query" else {}
    for prompt, query in zip(prompts, queries, strict=True):
        assert query.result() == generated(model, prompt, 14, **told), prompt


def test_the_config_says_whether_to_sample():
    model = small_llama()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8)
    with Relay(model, 1) as relay:
        query = relay.submit([1], max_new_tokens=2)
        options = query.serving.sampler.options
        # In `generate`, top_k is 50 by default.
        assert (options.temperature, options.top_p, options.top_k) == (0.7, 0.8, 50)
        options = relay.submit([1], max_new_tokens=2, temperature=0).serving.sampler.options
        assert options.greedy
        options = relay.submit(
            [1], max_new_tokens=2, temperature=1.2, top_p=1.0
        ).serving.sampler.options
        assert (options.temperature, options.top_p, options.top_k) == (1.2, 1.0, 0)
    with Relay(model, 1, generation_config=GenerationConfig()) as relay:
        assert relay.submit([1], max_new_tokens=2).serving.sampler.options == SamplingOptions()


def test_the_config_says_how_long_answers_are():
    model = small_llama(max_position_embeddings=512)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    with Relay(model, 1) as relay:
        assert relay.submit([1]).max_new_tokens == 7
        assert relay.submit([1], max_new_tokens=3).max_new_tokens == 3
    model.generation_config = GenerationConfig()
    with Relay(model, 1) as relay:
        assert relay.submit([1]).max_new_tokens == 128


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[3]]),
        ("typical_p", 0.5),
        ("guidance_scale", 2.0),
        ("forced_eos_token_id", 2),
        ("exponential_decay_length_penalty", (3, 1.1)),
        ("sequence_bias", [[[3, 4], 1.0]]),
        ("encoder_repetition_penalty", 1.3),
        ("max_time", 3.0),
    ],
)
def test_what_only_generate_knows_is_refused_by_name(name, value):
    model = small_llama()
    model.generation_config = GenerationConfig()
    setattr(model.generation_config, name, value)
    with pytest.raises(NotImplementedError, match=rf"Relay: generation_config\.{name} must be"):
        Relay(model, 1)
    assert "forward" not in model.__dict__
    with Relay(model, 1, generation_config=GenerationConfig()) as relay:
        assert relay.submit([1], max_new_tokens=2).status == "waiting"


def test_stop_strings_of_the_config():
    assert GenerationDefaults.of(GenerationConfig(stop_strings=["a", "b"])).stop == ("a", "b")
    assert GenerationDefaults.of(GenerationConfig(stop_strings="ab")).stop == ("ab",)
    assert GenerationDefaults.of(None, 3).eos == (3,)


# Logarithms of probabilities


def test_logprobs():
    model = FakeLlama()
    relay = Relay(model, 2, 32)
    seen = {}
    relay._batch.on_logits = lambda query, row: seen.setdefault(query.id, []).append(row.clone())
    options = {"max_new_tokens": 5, "temperature": 1.5, "repetition_penalty": 2.0}
    queries = [relay.submit([1, 2], logprobs=count, **options) for count in (0, 3, None)]
    relay.run()
    for query, count in zip(queries[:2], (0, 3), strict=True):
        assert [entry.token for entry in query.logprobs] == query.tokens
        for entry, logits in zip(query.logprobs, seen[query.id], strict=True):
            # The model's own probabilities, independent of the penalties and the temperature.
            expected = torch.log_softmax(logits, dim=-1)
            assert entry.logprob == expected[entry.token].item()
            values, ids = expected.sort(descending=True)
            pairs = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
            assert entry.top == tuple(pairs)
    assert queries[2].logprobs is None


# Bad values


@pytest.mark.parametrize(
    ("error", "given", "message"),
    [
        (ValueError, {"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        (ValueError, {"temperature": float("nan")}, "temperature must be finite"),
        (TypeError, {"temperature": "1"}, "temperature must be a number, got '1'"),
        (ValueError, {"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        (ValueError, {"top_k": -1}, "top_k must be >= 0, got -1"),
        (TypeError, {"top_k": 1.5}, "top_k must be an integer, got 1.5"),
        (ValueError, {"min_p": 1.01}, r"min_p must be in \[0, 1\], got 1.01"),
        (ValueError, {"repetition_penalty": 0}, "repetition_penalty must be from 1e-06 to 1000000"),
        (ValueError, {"repetition_penalty": float("inf")}, "repetition_penalty must be from"),
        (
            ValueError,
            {"frequency_penalty": float("nan")},
            "frequency_penalty must be within",
        ),
        (TypeError, {"presence_penalty": None}, "presence_penalty must be a number, got None"),
        (TypeError, {"logit_bias": [(1, 2)]}, "logit_bias must be a mapping of token ids to numb"),
        (ValueError, {"logit_bias": {97: 1}}, r"logit_bias must be in the vocabulary \[0, 97\), g"),
        (TypeError, {"logit_bias": {"a": 1}}, "logit_bias must be an integer, got 'a'"),
        (ValueError, {"logit_bias": {1: -float("inf")}}, r"logit_bias must be within 1e\+06, got"),
        (ValueError, {"suppress_tokens": [-1]}, "suppress_tokens must be in the vocabulary"),
        (TypeError, {"suppress_tokens": 3}, "suppress_tokens must be a sequence of token ids"),
        (
            ValueError,
            {"suppress_tokens": range(97)},
            "suppress_tokens must leave a token to choose",
        ),
        (ValueError, {"min_new_tokens": -1}, "min_new_tokens must be >= 0, got -1"),
        (ValueError, {"logprobs": 101}, "logprobs must be from 0 to 100, got 101"),
        (ValueError, {"seed": 2**64}, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        (TypeError, {"tempo": 1}, r"options must be known ones, got \['tempo'\]"),
    ],
)
def test_bad_options(error, given, message):
    with pytest.raises(error, match=f"^Relay.submit: {message}"):
        make_options(VOCAB, given)


def test_options_as_json_has_them():
    assert make_options(VOCAB, {"logit_bias": {"12": -1}}).logit_bias == ((12, -1.0),)


def test_a_processor_list_as_generate_builds_it():
    """All rules at once, in the order of `generate`."""
    options = SamplingOptions(
        repetition_penalty=1.4, logit_bias=((3, 5.0),), suppress_tokens=(6,), min_new_tokens=9
    )
    ids = torch.tensor([[*PROMPT, *ANSWER]])
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(3,): 5.0}),
            RepetitionPenaltyLogitsProcessor(1.4),
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, EOS, device="cpu"),
            SuppressTokensLogitsProcessor([6]),
        ]
    )
    assert torch.equal(ruled(options), processors(ids, logits_of(1)))
