"""Step 1: `generate` in batches. Each batch waits for its longest answer."""

import torch
from workload import ANSWERS, PROMPTS, SLOTS, make_model, report


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def answer_all(model) -> tuple[list[list[int]], int]:
    answers, steps = [], 0
    for first in range(0, len(PROMPTS), SLOTS):
        ids, mask = padded(PROMPTS[first : first + SLOTS])
        lengths = ANSWERS[first : first + SLOTS]
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=max(lengths), do_sample=False, pad_token_id=0
        )
        new = out[:, ids.shape[1] :].tolist()
        answers += [row[:length] for row, length in zip(new, lengths, strict=True)]
        steps += max(lengths) - 1
    return answers, steps


if __name__ == "__main__":
    answers, steps = answer_all(make_model())
    report(steps)
