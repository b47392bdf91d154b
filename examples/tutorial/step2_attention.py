"""Step 2: the same `generate` on ragged_attention. Padding is not read, and no mask is built."""

from step1_generate import answer_all
from workload import make_model, report

import baton_engines.huggingface  # noqa: F401  makes "baton" an attn_implementation

expected, _ = answer_all(make_model())
answers, steps = answer_all(make_model("baton"))
report(steps)
print("the answers of step 1:", answers == expected)
