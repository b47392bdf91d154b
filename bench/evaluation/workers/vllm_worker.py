"""vLLM on the CPU, in a separate environment: see protocol.py."""

from __future__ import annotations

import os
from typing import Any

from protocol import Clocked, serve


def start(work: dict[str, Any]):
    """The engine, with one sequence per slot at a time."""
    os.environ.update(
        # In this process, so that its steps can be timed.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{work['threads'] - 1}",
        # A function is sent to the worker's process, which measures attention.
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import vllm

    engine = vllm.LLM(
        model=work["model"],
        dtype=work["dtype"],
        max_num_seqs=work["slots"],
        max_model_len=max(len(ids) + count for ids, count in work["jobs"]),
        skip_tokenizer_init=True,
        **{"enable_prefix_caching": False, **work["options"]},
    ).llm_engine
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    attention = {
        layer.attn_backend.__module__ for layer in layers if hasattr(layer, "attn_backend")
    }
    rounds = 0
    engine.collective_rpc(seconds_in_attention)

    def run(jobs: list) -> Clocked:
        nonlocal rounds
        rounds += 1
        result = Clocked(len(jobs))
        for index, (ids, count) in enumerate(jobs):
            engine.add_request(
                f"{rounds}-{index}",
                {"prompt_token_ids": ids},
                vllm.SamplingParams(
                    temperature=0,
                    # No minimum length: it would forbid the end-of-sequence token.
                    max_tokens=count,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
                ),
            )
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                result.add(index, list(output.outputs[0].token_ids))
        (result.figures["attention_seconds"],) = engine.collective_rpc(seconds_in_attention)
        return result

    return {"versions": {"vllm-cpu": vllm.__version__}, "attention": sorted(attention)}, run


def seconds_in_attention(worker: Any) -> float:
    """Seconds that attention has taken in a worker's process since the last call; the first one
    begins to measure."""
    import time

    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    (kind,) = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}

    def measure(name: str) -> None:
        method = getattr(kind, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                kind.seconds += time.perf_counter() - begin

        setattr(kind, name, measured)

    if not hasattr(kind, "seconds"):
        # Some classes write keys and values in a separate call.
        for name in ("forward", "do_kv_cache_update"):
            if name in vars(kind):
                measure(name)
        kind.seconds = 0.0
    seconds, kind.seconds = kind.seconds, 0.0
    return seconds


if __name__ == "__main__":
    serve(start)
