"""The program that each rank of test_tensor_parallel runs, with the environment of torchrun.

It loads a saved model, sharded over the ranks, and runs `generate` and a relay. Rank 0 writes the
tokens of all ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from baton_engines import Relay, policies
from baton_engines.huggingface import AnyModel

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
prompts = json.loads((folder / "prompts.json").read_text())
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, tp_plan="auto", attn_implementation="baton"
).eval()

longest = max(map(len, prompts))
ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
with torch.inference_mode():
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
generated = out[:, longest:].tolist()

# Given costs decide which prompt tokens join which forward, not a rank's clock.
policy = policies.get("baton", costs=lambda work: 4.0 + work.tokens, max_token_gap=10.0)
with AnyModel(model) as handle, Relay(handle, 2, 64, policy) as relay:
    queries = [relay.submit(prompt, max_new_tokens=8) for prompt in prompts]
    relay.run()
    found = {
        "generate": generated,
        "relay": [query.tokens for query in queries],
        "kv_heads": handle.num_kv_heads,
        "ranks": handle.num_ranks,
    }

everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, found)
if dist.get_rank() == 0:
    output.write_text(json.dumps(everyone))
dist.destroy_process_group()
