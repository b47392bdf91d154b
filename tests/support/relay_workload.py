"""A small Llama, and queries that come and go in a relay on it."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baton_engines.relay import Query, Relay

CAPACITY = 72


def make_model(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """changes: different entries of the configuration."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        # Large enough for distinct attention patterns and logits.
        "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval().to(dtype)


class Workload:
    """44 queries of mixed lengths that arrive over time; some are cancelled, some are preempted and
    come back, and the batch changes its size."""

    def __init__(self, relay: Relay, seed: int, **options):
        self.relay = relay
        self.random = random.Random(seed)
        self.options = options
        self.queries: list[Query] = []
        self.logits: dict[int, list[torch.Tensor]] = {}
        relay._batch.on_logits = lambda query, logits: self.logits.setdefault(query.id, []).append(
            logits.clone()
        )

    def submit(self) -> None:
        length = self.random.choice([1, 2, 3, 5, 8, 13, 21, 34, 48])
        prompt = [self.random.randrange(131) for _ in range(length)]
        count = self.random.randint(1, 24)
        self.queries.append(self.relay.submit(prompt, max_new_tokens=count, **self.options))

    def run(self) -> None:
        relay, step = self.relay, 0
        for _ in range(12):
            self.submit()
        while relay.step() or relay.parked or len(self.queries) < 44:
            step += 1
            if len(self.queries) < 44 and step % 2:
                self.submit()
            if step % 9 == 4 and relay.running and relay.counters.cancelled < 8:
                relay.cancel(self.random.choice(relay.running))
            if step % 4 == 2 and relay.running:
                relay.preempt(self.random.choice(relay.running))
            if step % 6 == 5 or not relay.running:
                for query in relay.parked:
                    relay.resume(query)
            if step % 25 == 10:
                relay.resize(self.random.choice([3, 4, 6]))
        assert relay.cache.bytes_in_use == 0 and relay.cache.shape.used == ()
        assert relay.counters.preemptions >= 5
        assert relay.counters.cancelled >= 3
        assert relay.counters.finished >= 30
