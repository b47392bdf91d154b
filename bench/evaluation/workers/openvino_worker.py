"""OpenVINO GenAI's continuous batching, in a separate environment: see protocol.py.

The model is a folder that optimum-intel exported: `openvino_model.xml` next to the configuration.
Nothing is quantized; keys and values have the dtype of the computation too.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy
import openvino
import openvino_genai
from protocol import Clocked, serve

TYPES = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}


def start(work: dict[str, Any]):
    """The pipeline, with one sequence per slot at a time."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = work["slots"]
    scheduler.max_num_batched_tokens = 512
    scheduler.cache_size = 2
    # With it, max_num_seqs would have no effect: all prompts would be taken at once.
    scheduler.dynamic_split_fuse = False
    scheduler.enable_prefix_caching = False
    kind = TYPES[work["dtype"]]
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        work["model"],
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": kind,
            "INFERENCE_NUM_THREADS": work["threads"],
        },
    )

    def run(jobs: list) -> Clocked:
        result = Clocked(len(jobs))
        handles = [
            pipeline.add_request(
                index, openvino.Tensor(numpy.array([ids], dtype=numpy.int64)), _greedy(count)
            )
            for index, (ids, count) in enumerate(jobs)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        result.add(index, output.generated_ids)
        return result

    versions = {name: importlib.metadata.version(name) for name in ("openvino", "openvino-genai")}
    return {"versions": versions}, run


def _greedy(count: int) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    # No minimum length: it would forbid the end-of-sequence token instead of ignoring it.
    config.max_new_tokens = count
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    serve(start)
