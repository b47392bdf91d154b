"""The effect of rounding keys and values to 8 bits: on perplexity, logits and greedy tokens.

One model reads one text through a cache in the model's dtype and through 8-bit caches, in windows
of the same length; a token's logits are compared where all have read the same tokens before. Greedy
answers continue from each cache's own choices, so that one different token changes all later ones.
The row `transformers` tells how often that happens without 8-bit caches: it is the same model in
the same dtype, whose sums are rounded in another order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from baton_engines import Relay, patch_llama
from baton_engines.cli.prompts_io import demo_prompts

from . import describe_run, perplexity

KINDS = {"model's": None, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def logit_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean square difference, in units of the logits' own spread around their mean."""
    spread = exact - exact.mean(1, keepdim=True)
    return ((logits - exact).square().mean() / spread.square().mean()).sqrt().item()


def answers(llama: Any, prompts: Sequence[Sequence[int]], steps: int, kv_dtype: Any) -> list:
    """Greedy tokens of every prompt."""
    longest = max(map(len, prompts)) + steps
    with Relay(llama, len(prompts), longest, kv_dtype=kv_dtype) as relay:
        queries = [
            relay.submit(prompt, max_new_tokens=steps, temperature=0.0, eos=None)
            for prompt in prompts
        ]
        relay.run()
    return [query.tokens for query in queries]


def plain_reading(model: Any, token_ids: torch.Tensor, window: int) -> perplexity.Reading:
    """Reads the text with the model as transformers computes it."""
    losses, logits = [], []
    for ids in token_ids.split(window):
        found = model(ids[None]).logits[0, :-1].float()
        losses.append(-found.double().log_softmax(1).gather(1, ids[1:, None])[:, 0])
        logits.append(found)
    return perplexity.Reading(torch.cat(losses), torch.cat(logits))


def plain_answers(model: Any, prompts: Sequence[Sequence[int]], steps: int) -> list:
    """Greedy tokens of every prompt, each by itself, from transformers."""
    found = []
    # `generate` takes from there what its arguments leave out, the end-of-sequence token included.
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def equal_share(ones: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of tokens that come before the first difference."""
    equal = total = 0
    for one, other in zip(ones, others, strict=True):
        pairs = list(zip(one, other, strict=True))
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    return equal / total


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_quality", description=__doc__.splitlines()[0]
    )
    perplexity.add_options(parser)
    parser.add_argument("--prompts", type=int, default=8, help="of the demo's, for greedy answers")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    for name, least in (("prompts", 1), ("steps", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    model, tokenizer, token_ids = perplexity.load(parser, options)
    prompts = [record.encode(tokenizer) for record in demo_prompts()[: options.prompts]]
    print(f"{describe_run()}\n{options.model}, {options.dtype}: {len(token_ids)} tokens of "
          f"{options.text.name}, {len(prompts)} answers of {options.steps} tokens")  # fmt: skip
    print(f"{'cache':<16}{'bytes/token':>12}{'perplexity':>12}{'logit error':>13}"
          f"{'likeliest':>11}{'greedy':>8}")  # fmt: skip
    with torch.inference_mode():
        plain = plain_reading(model, token_ids, options.window)
        plain_tokens = plain_answers(model, prompts, options.steps)
    with torch.inference_mode(), patch_llama(model) as llama:
        rows = {
            name: (
                perplexity.read(llama, token_ids, options.window, kv_dtype),
                answers(llama, prompts, options.steps, kv_dtype),
                llama.new_cache(1, 1, dtype=kv_dtype).bytes_per_token,
            )
            for name, kv_dtype in KINDS.items()
        }
    exact, exact_tokens, size = rows["model's"]
    rows["transformers"] = plain, plain_tokens, size
    for name, (reading, tokens, size) in rows.items():
        same = reading.same_likeliest(exact)
        error = logit_error(reading.logits, exact.logits)
        print(f"{name:<16}{size:>12}{reading.perplexity:>12.4f}{error:>13.2%}{same:>11.1%}"
              f"{equal_share(tokens, exact_tokens):>8.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
