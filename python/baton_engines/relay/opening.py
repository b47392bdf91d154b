"""Creates the parts of a `Relay` from its arguments: the patch, the cache, the prefiller, the
loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch

from baton_kernels.batch_shape import checked_int
from baton_kernels.ops.checks import EIGHT_BITS

from ..llama.handle import ModelHandle
from ..policies import Policy
from ..prefill import Prefiller, Serial
from ..prefill import get as get_prefiller
from ..query import Query
from ..slots import Slots
from .autoscale import Autoscale
from .batch import Batch
from .decode_loop import DecodeLoop
from .graphs import GraphRuntime, open_graphs
from .in_flight import InFlight
from .submission import Limits


def open_loop(
    model,
    policy: Policy,
    undo: contextlib.ExitStack,
    *,
    num_slots: int,
    capacity: int | None,
    tokenizer,
    generation_config,
    aligned: bool,
    shaping: str,
    kv_budget: int | None,
    kv_dtype: torch.dtype | str | None,
    prefix_cache: int | None,
    max_slots: int | None,
    weight_dtype,
    cuda_graphs: bool | GraphRuntime | None,
    prefill: str | Prefiller,
    clock: Callable[[], float],
    on_end: Callable[[Query], object],
) -> tuple[Limits, Batch, DecodeLoop]:
    """The parts of a relay.

    Args:
        model: a transformers model, or a handle of one.
        policy: an object that no other relay uses.
        undo: collects what has to be undone when the relay is closed. Written.
        on_end: called with every query that ends.
        num_slots, capacity, tokenizer, generation_config, aligned, shaping, kv_budget,
            kv_dtype, prefix_cache, max_slots, weight_dtype, cuda_graphs, prefill, clock: see
            `Relay`.

    Raises:
        Exception: see `Relay`; the caller must then close `undo`.
    """
    autoscale = None
    if max_slots is not None:
        max_slots = checked_int("Relay", "max_slots", max_slots, num_slots)
        autoscale = Autoscale(num_slots, max_slots)
    if kv_budget is not None:
        kv_budget = checked_int("Relay", "kv_budget", kv_budget, 1)
    kv_dtype = _checked_dtype(kv_dtype, prefill)
    if prefix_cache is not None:
        prefix_cache = checked_int("Relay", "prefix_cache", prefix_cache, 1)
    if not isinstance(model, ModelHandle):
        # Imported only here: a handle of another kind needs no transformers.
        from ..huggingface.sharing import shared_handle

        model = undo.enter_context(shared_handle(model, weight_dtype=weight_dtype))
    elif weight_dtype is not None:
        raise ValueError(
            f"Relay: weight_dtype must be None with a handle, got {weight_dtype!r}; give it to "
            "patch_llama"
        )
    limits = Limits.of_model(model, capacity, tokenizer, generation_config)
    slots = Slots(
        model,
        num_slots,
        limits.capacity,
        aligned=aligned,
        shaping=shaping,
        padded=policy.pads,
        kv_budget=kv_budget,
        kv_dtype=kv_dtype,
        prefix_bytes=prefix_cache,
    )
    if slots.whole_prompts and policy.splits_prompts:
        raise ValueError(
            f"Relay: policy must compute prompts whole in an aligned cache and under dynamic RoPE, "
            f"got {policy.name}, which splits them"
        )
    graphs = open_graphs(slots, cuda_graphs, shaping)
    if graphs is not None:
        undo.callback(graphs.release)
    # The clocks of ranks differ, and what they compute together must be the same.
    alone = model.num_ranks == 1
    if policy.needs_times and not alone:
        raise ValueError(
            f"Relay: policy must not depend on the clock under tensor parallelism (costs=, or no "
            f"max_token_gap), got {policy.name}"
        )
    prefiller = get_prefiller(prefill)
    prefiller.open(model)
    # Closed before the patch is undone, because the workers use it.
    undo.callback(prefiller.close)
    limits = replace(limits, kv_budget=kv_budget, bytes_per_token=slots.cache.bytes_per_token)
    batch = Batch(slots, policy, clock, on_end)
    loop = DecodeLoop(batch, InFlight(batch, prefiller), autoscale, graphs, observed=alone)
    return limits, batch, loop


def _checked_dtype(dtype: torch.dtype | str | None, prefill: str | Prefiller) -> torch.dtype | None:
    """kv_dtype as a torch.dtype; names are accepted."""
    if isinstance(dtype, str):
        dtype = {str(one).removeprefix("torch."): one for one in EIGHT_BITS}.get(dtype, dtype)
    if dtype is None or dtype not in EIGHT_BITS:
        if dtype is None or isinstance(dtype, torch.dtype):
            return dtype
        raise ValueError(f"Relay: kv_dtype must be int8, float8_e4m3fn or None, got {dtype!r}")
    # A prompt computed elsewhere attends to keys and values that are not rounded yet.
    if prefill != "serial" and not isinstance(prefill, Serial):
        name = prefill if isinstance(prefill, str) else type(prefill).__name__
        raise NotImplementedError(f"Relay: prefill must be 'serial' with kv_dtype, got {name}")
    return dtype
