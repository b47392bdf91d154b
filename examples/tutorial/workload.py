"""The work of each step of the tutorial: a small random model, prompts, and lengths of answers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SLOTS = 4
ANSWERS = [4, 30, 6, 9, 24, 3, 11, 5, 18, 7, 12, 4]  # tokens of each query's answer

_random = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(1, 97, (n,), generator=_random).tolist() for n in [5, 9, 3, 12, 7, 4] * 2]


def make_model(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def report(steps: int) -> None:
    """Prints the decode steps, and the share of slots in them that computed nothing useful."""
    useful = sum(length - 1 for length in ANSWERS)  # the first token comes from the prompt
    print(f"{steps} decode steps, {1 - useful / (SLOTS * steps):.0%} of the slots idle")
