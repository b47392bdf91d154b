"""Step 3: our own loop. A query that has ended passes its row on to the next one."""

import step1_generate
import torch
from workload import ANSWERS, PROMPTS, SLOTS, make_model, report

import baton_engines.huggingface  # noqa: F401  makes "baton" an attn_implementation
from baton_engines.huggingface import slot_cache

model = make_model("baton")


def prefill(prompts):
    """A cache, its mask, and the first token of each answer."""
    cache = slot_cache(model, capacity=64)
    ids, mask = step1_generate.padded(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache, mask, out.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def answer_all():
    answers = [[] for _ in PROMPTS]
    rows = list(range(SLOTS))  # which query is in which row
    waiting = list(range(SLOTS, len(PROMPTS)))
    cache, mask, tokens = prefill([PROMPTS[query] for query in rows])
    steps = 0
    while True:
        for row in range(SLOTS):
            if rows[row] is not None:
                answers[rows[row]].append(tokens[row].item())
            while rows[row] is not None and len(answers[rows[row]]) == ANSWERS[rows[row]]:
                rows[row] = waiting.pop(0) if waiting else None
                if rows[row] is not None:  # a newcomer enters between two steps
                    other, _, tokens[row] = prefill([PROMPTS[rows[row]]])
                    mask = cache.insert(other, row, mask)
                    answers[rows[row]].append(tokens[row].item())
        if all(query is None for query in rows):
            return answers, steps
        mask = torch.cat([mask, mask.new_ones(SLOTS, 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        tokens = out.logits[:, -1:].argmax(-1)
        steps += 1


answers, steps = answer_all()
report(steps)
print("the answers of step 1:", answers == step1_generate.answer_all(make_model())[0])
