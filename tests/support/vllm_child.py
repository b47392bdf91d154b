"""vLLM in a separate process and environment; see `tests/engines/vllm`.

Reads a list of runs from one file and writes the answers to another.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

# The default options of an engine. Prompts of more than 16 tokens are prefilled in chunks; pages
# are smaller than prompts, so that requests have several.
OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 26,
}


def start_counting(worker: Any) -> None:
    """Counts the calls of our attention in a worker's process."""
    from baton_engines.vllm.backend import Impl

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        Impl.calls += attn_metadata is not None
        return original(
            self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )

    if not hasattr(Impl, "calls"):
        original, Impl.forward = Impl.forward, forward
    Impl.calls = 0


def counted(worker: Any) -> dict[str, Any]:
    """Calls in a worker's process, the kinds of its layers, and threads that the ops started."""
    from baton_engines.vllm.backend import Impl

    tasks = Path("/proc/self/task").iterdir()
    threads = [(task / "comm").read_text().strip() for task in tasks]

    modules = worker.model_runner.get_model().modules()
    kinds = {type(module).__module__ for module in modules}
    return {
        "calls": Impl.calls,
        "layers": "baton_engines.vllm.layers" in kinds,
        "helpers": threads.count("baton-helper"),
    }


def attempt(work: dict[str, Any]) -> dict[str, Any]:
    """The result of `run`, or the error that it raises."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return run(work)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def run(work: dict[str, Any]) -> dict[str, Any]:
    """One engine's answers to batches of prompts, one after another."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=work["model"], **{**OPTIONS, **work.get("options", {})})
    engine.collective_rpc(start_counting)
    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=work["max_tokens"],
        logprobs=0,
        prompt_logprobs=0 if work.get("prompt_logprobs") else None,
        ignore_eos=True,
        detokenize=False,
    )
    answers = []
    for batch in work["batches"]:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in batch], parameters, use_tqdm=False
        )
        answers.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens,
                    "logprobs": [
                        entry[token].logprob
                        for token, entry in zip(
                            output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
                        )
                    ],
                    # The first token has none.
                    "prompt_logprobs": [
                        entry[token].logprob
                        for token, entry in zip(
                            output.prompt_token_ids[1:],
                            (output.prompt_logprobs or [None])[1:],
                            strict=output.prompt_logprobs is not None,
                        )
                    ],
                }
                for output in outputs
            ]
        )
    workers = engine.collective_rpc(counted)
    engine.llm_engine.engine_core.shutdown()
    return {"answers": answers, "workers": workers}


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    results = []
    for work in json.loads(source.read_text()):
        results.append(attempt(work))
        # After each run, so that a crash leaves the results before it.
        target.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
