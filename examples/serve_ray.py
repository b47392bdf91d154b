"""Two replicas of a relay on Ray Serve, behind OpenAI's interface.

    python examples/serve_ray.py [MODEL]

MODEL is a folder or hub id that every node can load; default: SmolLM2-135M-Instruct. Ctrl-C ends
it.
"""

import sys

from ray import serve

from baton_engines.serve.on_ray import deployment

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
application = deployment(model, capacity=1024, num_slots=8, num_replicas=2)
# Instead of num_replicas: autoscaling_config={"min_replicas": 1, "max_replicas": 4}.
serve.run(application, blocking=True)
