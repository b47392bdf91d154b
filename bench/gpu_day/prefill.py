"""Whole prompts as CUDA graphs, compared with FlashAttention-3 and torch's backends."""

from __future__ import annotations

import torch

from baton_kernels import ragged_attention

from ..kernels.attention_work import AttentionWork
from ..kernels.cuda_peers import prefill_peers
from ..kernels.measure import OURS, Way
from .decode import LLAMA, Sizes
from .device import Stage, run
from .timing import beside_peers, our_us, time_ways


@torch.inference_mode()
def prefill(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    sizes = Sizes(stage)
    # A matrix product reads its operands from the cache in any case, so two layers are enough.
    sizes.cache_bytes = 1
    for rows, tokens in stage.pick(((1, 2048), (1, 8192), (1, 512), (8, 512)), ((1, 24), (2, 7))):
        label = f"{rows} x {tokens} tokens, {LLAMA}"
        if not record.wants(label, 4.0):
            continue
        with record.attempt(label):
            work = AttentionWork(
                LLAMA, [tokens] * rows, [tokens] * rows, dtype=stage.dtype, device=sizes
            )
            ours = Way(
                "ragged_attention", work.calls(ragged_attention), work.check, OURS,
                work.poison_padding,
            )  # fmt: skip
            peers = prefill_peers(work) if stage.device == "cuda" else []
            found = time_ways([ours, *peers], stage.device)
            us = our_us(found)
            record.add(
                label, flops=work.flops, ways=found, tflop_per_s=us and work.flops / us / 1e6,
                beside=beside_peers(found),
            )  # fmt: skip
    rows = [row for row in record.rows if row.get("tflop_per_s")]
    record.headline = "; ".join(f"{row['case']}: {row['tflop_per_s']:.4g} TFLOP/s" for row in rows)
    record.lines = [f"{row['case']}: {row['beside']}" for row in rows]


if __name__ == "__main__":
    run(prefill)
