"""What rounding keys and values to eight bits costs: perplexity, logits and greedy tokens.

One model reads one text through a cache of its own dtype and through caches of eight bits, in
windows of the same length; a token's logits are compared where all have read the same tokens
before. Greedy answers go on from what each cache has chosen itself, so that one other token makes
all later ones others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baton_engines import PackedBatch, Relay, load_model, patch_llama
from baton_engines.cli.prompts_io import demo_prompts
from bench import describe_run

TEXT = Path(__file__).parents[1] / "LICENSE"
KINDS = {"model's": None, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


class Reading(NamedTuple):
    """What a model makes of a text.

    Attributes:
        losses: float64, minus the logarithm of the probability of each token but a window's first.
        logits: float32 `[places, vocab]` in these places.
    """

    losses: torch.Tensor
    logits: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Of a token, on average."""
        return math.exp(self.losses.mean().item())


def read(llama: Any, token_ids: torch.Tensor, window: int, kv_dtype: Any) -> Reading:
    """The text through a cache of this dtype.

    Args:
        llama: of `patch_llama`.
        token_ids: `[tokens]`.
        window: tokens that are read together.
        kv_dtype: None for the model's.
    """
    losses, logits = [], []
    for ids in token_ids.split(window):
        if len(ids) < 2:
            continue
        cache = llama.new_cache(1, len(ids), dtype=kv_dtype)
        batch = PackedBatch.from_shape(cache.shape, [cache.allocate(len(ids))], [len(ids)])
        found = llama.forward(ids, batch, cache, logits="all")[:-1]
        losses.append(-found.double().log_softmax(1).gather(1, ids[1:, None])[:, 0])
        logits.append(found)
    return Reading(torch.cat(losses), torch.cat(logits))


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


def equal_share(ones: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Of the tokens, those that come before the first that differs."""
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
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=8, help="of the demo's, for greedy answers")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    for name, least in (("window", 2), ("prompts", 1), ("steps", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    if tokenizer is None:
        parser.error(f"--model must have a tokenizer, got none in {options.model}")
    text = options.text.read_text(encoding="utf-8")
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(token_ids) < 2:
        parser.error(f"--text must hold at least 2 tokens, got {len(token_ids)}")
    prompts = [record.encode(tokenizer) for record in demo_prompts()[: options.prompts]]
    print(f"{describe_run()}\n{options.model}, {options.dtype}: {len(token_ids)} tokens of "
          f"{options.text.name}, {len(prompts)} answers of {options.steps} tokens")  # fmt: skip
    print(f"{'cache':<16}{'bytes/token':>12}{'perplexity':>12}{'logit error':>13}"
          f"{'likeliest':>11}{'greedy':>8}")  # fmt: skip
    with torch.inference_mode(), patch_llama(model) as llama:
        for name, kv_dtype in KINDS.items():
            reading = read(llama, token_ids, options.window, kv_dtype)
            tokens = answers(llama, prompts, options.steps, kv_dtype)
            if kv_dtype is None:
                exact, exact_tokens = reading, tokens
            same = (reading.logits.argmax(1) == exact.logits.argmax(1)).double().mean().item()
            size = llama.new_cache(1, 1, dtype=kv_dtype).bytes_per_token
            error = logit_error(reading.logits, exact.logits)
            print(f"{name:<16}{size:>12}{reading.perplexity:>12.4f}{error:>13.2%}{same:>11.1%}"
                  f"{equal_share(tokens, exact_tokens):>8.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
