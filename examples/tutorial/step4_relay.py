"""Step 4: the relay. It has the loop, and policies that differ only in who enters when."""

from step1_generate import answer_all
from workload import ANSWERS, PROMPTS, SLOTS, make_model, report

from baton_engines import Relay

expected, _ = answer_all(make_model())

for policy in ("run_to_completion", "baton"):
    with Relay(make_model(), num_slots=SLOTS, capacity=64, policy=policy) as relay:
        queries = [
            relay.submit(prompt, max_new_tokens=length)
            for prompt, length in zip(PROMPTS, ANSWERS, strict=True)
        ]
        relay.run()
        print(f"{policy}: ", end="")
        report(relay.summary()["steps"])
        print("the answers of step 1:", [query.result() for query in queries] == expected)
