"""The same requests through transformers itself: static batches, and its continuous batching.

Both run the unpatched model in this process, with the same threads.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .run import Job, PeakMemory, Run, latencies, rates


class _Clocked(StoppingCriteria):
    """Ends each row of a batch at its own length, and records when each token was available."""

    def __init__(self, limits: torch.Tensor, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(self.clock())
        return input_ids.shape[1] >= self.limits


@torch.inference_mode()
def static_batches(
    model: Any, jobs: Sequence[Job], slots: int, clock: Callable[[], float] = time.perf_counter
) -> Run:
    """`generate`, one left-padded batch after the other; a batch runs until its longest query
    ends."""
    requests = [job.request for job in jobs]
    tokens: list[list[int]] = []
    times: list[list[float]] = []
    with PeakMemory() as memory:
        begin = clock()
        for first in range(0, len(jobs), slots):
            batch = jobs[first : first + slots]
            width = max(len(job.token_ids) for job in batch)
            # Built on the host and copied once: on a GPU, each small piece would be a launch.
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, job in enumerate(batch):
                ids[row, width - len(job.token_ids) :] = torch.tensor(job.token_ids)
                mask[row, width - len(job.token_ids) :] = 1
            limits = torch.tensor([job.request.output_tokens for job in batch], device=model.device)
            clocked = _Clocked(width + limits, clock)
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=_greedy(int(limits.max())),
                stopping_criteria=StoppingCriteriaList([clocked]),
            )
            for job, row in zip(batch, out[:, width:].tolist(), strict=True):
                count = job.request.output_tokens
                tokens.append(row[:count])
                times.append([at - begin for at in clocked.times[:count]])
        seconds = clock() - begin
        memory.read()
    figures = {
        **rates(requests, seconds),
        **latencies(requests, times),
        "peak_bytes": memory.bytes,
    }
    return Run(tokens, figures)


def continuous_batching(
    model: Any,
    jobs: Sequence[Job],
    slots: int,
    clock: Callable[[], float] = time.perf_counter,
    timeout: float = 600.0,
) -> Run:
    """`ContinuousBatchingManager` with at most `slots` requests in a batch; all submitted at once.

    Raises:
        RuntimeError: a request failed, or no result came for `timeout` seconds.
    """
    requests = [job.request for job in jobs]
    page = 64
    pages = sum(-(-(r.prompt_tokens + r.output_tokens) // page) + 1 for r in requests)
    config = _batching_config(
        page,
        num_blocks=pages,
        max_batch_tokens=512,
        max_requests_per_batch=slots,
        # The prompts share no prefix by design; graphs and double buffering are for GPUs.
        allow_block_sharing=False,
        use_cuda_graph=False,
        use_async_batching=False,
    )
    tokens: dict[int, list[int]] = {}
    times: list[list[float]] = [[] for _ in jobs]
    with (
        PeakMemory() as memory,
        model.continuous_batching_context_manager(
            generation_config=_greedy(max(r.output_tokens for r in requests)),
            continuous_batching_config=config,
        ) as manager,
    ):
        begin = clock()
        for index, job in enumerate(jobs):
            manager.add_request(
                job.token_ids,
                request_id=str(index),
                max_new_tokens=job.request.output_tokens,
                streaming=True,
            )
        while len(tokens) < len(jobs):
            result = manager.get_result(timeout=timeout)
            if result is None or result.error:
                raise RuntimeError(
                    f"continuous batching: every request must end, got "
                    f"{result.error if result else f'nothing for {timeout} s'}"
                )
            index, now = int(result.request_id), clock() - begin
            new = len(result.generated_tokens) - len(times[index])
            times[index] += [now] * new
            if result.is_finished():
                tokens[index] = list(result.generated_tokens)
        seconds = clock() - begin
        memory.read()
    figures = {
        **rates(requests, seconds),
        **latencies(requests, times),
        "peak_bytes": memory.bytes,
    }
    return Run([tokens[index] for index in range(len(jobs))], figures)


def _batching_config(page: int, **options: Any) -> Any:
    """Releases of transformers have different names for the number of tokens per page."""
    from transformers import ContinuousBatchingConfig

    known = inspect.signature(ContinuousBatchingConfig).parameters
    name = next((name for name in ("page_size", "block_size") if name in known), None)
    if name is None:
        raise RuntimeError("continuous batching: this transformers names no size of a page")
    return ContinuousBatchingConfig(
        **{name: page}, **{key: value for key, value in options.items() if key in known}
    )


def _greedy(tokens: int) -> GenerationConfig:
    # No end of sequence: the number of tokens is fixed.
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1, use_cache=True
    )


class Peer(NamedTuple):
    """Another way to serve jobs: `run(model, jobs, slots)`, and its description."""

    run: Callable[[Any, Sequence[Job], int], Run]
    says: str


PEERS = {
    "transformers_static": Peer(
        static_batches,
        "transformers' generate in left-padded batches, each until its longest query has ended",
    ),
    "transformers_continuous": Peer(
        continuous_batching,
        "transformers' continuous batching: paged cache, prefill and decode in one forward",
    ),
}
