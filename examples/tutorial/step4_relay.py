"""Step 4: the relay. It provides the loop, and policies that differ only in who enters when."""

from step1_generate import answer_all
from workload import ANSWERS, PROMPTS, SLOTS, make_model

from baton_engines import Relay

expected, _ = answer_all(make_model())

steps = {}
for policy in ("run_to_completion", "orca", "baton"):
    with Relay(make_model(), num_slots=SLOTS, capacity=64, policy=policy) as relay:
        queries = [
            relay.submit(prompt, max_new_tokens=length)
            for prompt, length in zip(PROMPTS, ANSWERS, strict=True)
        ]
        relay.run()
        steps[policy] = relay.summary()["steps"]
        answers = [query.result() for query in queries]
        print(f"{policy}, the answers of step 1:", answers == expected)
fewer = [policy for policy in steps if steps[policy] < steps["run_to_completion"]]
print("fewer steps than run_to_completion:", *fewer)
