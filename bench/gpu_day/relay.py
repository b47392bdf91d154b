"""The relay on a random Llama: decode steps, policies, `generate`, the simulation's error."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from baton_engines import PackedBatch, Relay, llama, patch_llama
from baton_engines.testing.recorded_graphs import RecordedGraphs
from baton_kernels import PackedWeight

from .. import workloads
from ..evaluation.measure import agreement
from ..evaluation.peers import PEERS
from ..evaluation.run import make_jobs, run_relay
from ..evaluation.systems import REFERENCE, SYSTEMS
from ..studies.simulate.measured import calibrate
from ..studies.simulate.validate import Case, validate
from .device import Stage, run
from .rates import read_rate
from .timing import Replay

SIZES = {
    "tiny": (64, 96, 2, 4, 2, 131),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}  # hidden, intermediate, layers, heads, kv heads, vocabulary
POLICIES = ("run_to_completion", "orca", "baton")
FIGURES = ("seconds", "output_tokens_per_second", "ttft_p50", "time_per_token_p50",
           "time_per_token_p99", "steps", "replayed_steps", "rows_per_step",
           "slot_idle")  # fmt: skip
BY_THE_HOST = ", launched by the host"


def make_model(stage: Stage, sizes: str) -> LlamaForCausalLM:
    """A Llama with random weights, created on the device: seconds instead of minutes."""
    hidden, wide, layers, heads, kv_heads, vocabulary = SIZES[sizes]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=131072, tie_word_embeddings=sizes != "8b", bos_token_id=None,
        eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(stage.dtype)
    try:
        torch.manual_seed(0)
        with torch.device(stage.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def projections(function: Any) -> Iterator[None]:
    """Within the block, the patched forward uses another function for projections."""
    before = llama.forward.project
    llama.forward.project = function
    try:
        yield
    finally:
        llama.forward.project = before


def by_cublas(
    x: torch.Tensor, weight: PackedWeight | torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The projection by torch's own product. On a GPU the weight is not packed; on a CPU, which is
    only used to try this stage out, it is unpacked in every call."""
    return functional.linear(
        x, weight.unpack() if isinstance(weight, PackedWeight) else weight, bias
    )


@torch.inference_mode()
def step_us(stage: Stage, patched: Any, rows: int, context: int) -> dict[str, float]:
    """Microseconds of one decode step: launched by the relay, and replayed as a graph."""
    cache = patched.new_cache(rows, context + 8)
    try:
        slots = [cache.allocate(context) for _ in range(rows)]
        cache.keys.normal_()
        cache.values.normal_()
        batch = PackedBatch.from_shape(cache.shape, slots, [1] * rows, stage.device)
        tokens = torch.arange(rows, device=stage.device) % patched.vocab_size

        def call() -> torch.Tensor:
            return patched.forward(tokens, batch, cache, logits="last")

        for _ in range(3):
            call()
        stage.synchronize()
        begin = time.perf_counter()
        for _ in range(8):
            call()
        stage.synchronize()
        found = {"eager_us": 1e6 * (time.perf_counter() - begin) / 8}
        if stage.device == "cuda":
            replay = Replay([call], stage.device)
            if replay.captured:
                found["graph_us"] = 1e6 * sorted(replay.seconds() for _ in range(5))[2]
        return found
    finally:
        cache.release()


def weights_and_cache_us(stage: Stage, model: Any, rows: int, context: int, rate: float) -> float:
    """The least time for reading the weights and the valid keys and values once."""
    weights = sum(p.nbytes for p in model.parameters())
    config = model.config
    if not config.tie_word_embeddings:
        # A step reads single rows of the embedding, but all of the weight for the logits.
        weights -= model.get_input_embeddings().weight.nbytes
    columns = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 1e6 * (weights + rows * context * columns * stage.dtype.itemsize) / rate


def steps(stage: Stage, model: Any, rate: float) -> None:
    """Decode steps with our projections and with cuBLAS's, compared with the bytes to be read."""
    context = stage.pick(1024, 16)
    for name, project in (("ours", llama.forward.project), ("cuBLAS", by_cublas)):
        for rows in stage.pick((1, 8, 32, 128), (1, 3)):
            case = f"step of {rows} rows x {context}, linear: {name}"
            if not stage.record.wants(case, 2.0):
                continue
            with stage.record.attempt(case), projections(project), patch_llama(model) as patched:
                found = step_us(stage, patched, rows, context)
                least = weights_and_cache_us(stage, model, rows, context, rate)
                stage.record.add(case, rows=rows, context=context, least_us=least, **found)


def warmed_up(stage: Stage, patched: Any, name: str, slots: int, capacity: int) -> Relay:
    """A relay with a policy, or with one whose steps the host launches. It has already captured the
    graphs for all numbers of rows: captures happen once, but would be charged to a run of
    seconds."""
    system = SYSTEMS[name.removesuffix(BY_THE_HOST)]
    graphs: Any = None if stage.device == "cuda" else RecordedGraphs()
    options = {**system.relay_options, "cuda_graphs": graphs if name == system.name else False}
    relay = dataclasses.replace(system, relay_options=options).relay(patched, slots, capacity)
    for number in range(slots):
        relay.submit([1, 2], max_new_tokens=2 + 2 * number, eos=None)
    relay.run()
    return relay


def policies(stage: Stage, model: Any, vocabulary: int) -> None:
    """Each policy on the same queries, one of them without graphs too, then `generate` on them;
    compares the tokens."""
    record = stage.record
    slots, count, divisor = stage.pick((32, 96, 1.0), (2, 4, 16.0))
    requests = workloads.orca(count, divisor=divisor)
    stream = torch.randint(vocabulary, (9973,), generator=torch.Generator().manual_seed(0))
    jobs = make_jobs(requests, stream.tolist())
    capacity = workloads.longest(requests)
    expected = None
    others = (p for p in POLICIES if p != REFERENCE)
    for name in (REFERENCE, REFERENCE + BY_THE_HOST, *others):
        if record.wants(name, 5.0):
            with record.attempt(name), patch_llama(model) as patched:
                found = run_relay(
                    lambda n=name: warmed_up(stage, patched, n, slots, capacity), jobs
                )
                expected = expected or found.tokens
                figures = {figure: found.figures[figure] for figure in FIGURES}
                record.add(name, **figures, **agreement(expected, found.tokens))
    if record.wants("generate", 5.0):
        with record.attempt("generate"):
            found = PEERS["transformers_static"].run(model, jobs, slots)
            same = agreement(expected, found.tokens) if expected else {}
            figures = {key: found.figures[key] for key in FIGURES if key in found.figures}
            record.add("generate", **figures, **same)


def simulation(stage: Stage, model: Any) -> None:
    """Measures and fits the costs of forwards; compares their prediction of a run with the run."""
    record = stage.record
    count, slots = stage.pick((24, 8), (3, 2))
    if not record.wants("simulation", 10.0):
        return

    def report(case: Case) -> None:
        record.add(f"simulated {case.policy}, {case.workload}", **case.errors(), drift=case.drift)
        if record.seconds_left < 1:
            raise TimeoutError("no time for more policies")

    with record.attempt("simulation"), patch_llama(model) as patched:
        longest = workloads.longest(workloads.orca(count, divisor=4))
        cost, samples = calibrate(patched, max_rows=slots, max_length=longest, repeats=2)
        record.add("calibration", forwards=len(samples), error=None, fit=cost.error)
        try:
            validate(patched, cost, count=count, num_slots=slots, report=report)
        except TimeoutError as error:
            print(error)


def relay(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    sizes = "tiny" if stage.small else stage.model
    rate, _ = read_rate(stage)
    begin = time.perf_counter()
    model = make_model(stage, sizes)
    stage.synchronize()
    if record.wants("model"):
        parameters = sum(p.numel() for p in model.parameters())
        record.add("model", sizes=sizes, parameters=parameters, s=time.perf_counter() - begin)
    steps(stage, model, rate)
    policies(stage, model, SIZES[sizes][5])
    if not stage.small:
        simulation(stage, model)
    summary(stage, sizes)


def summary(stage: Stage, sizes: str) -> None:
    """Lines for the table."""
    record = stage.record
    lines, rows = [], record.rows
    for row in rows:
        if "eager_us" in row:
            graph = f", graph {row['graph_us']:.0f} us" if "graph_us" in row else ""
            lines.append(
                f"{row['case']}: {row['eager_us']:.0f} us{graph}; to be read: "
                f"{row['least_us']:.0f} us"
            )
        elif "output_tokens_per_second" in row:
            lines.append(
                f"{row['case']}: {row['output_tokens_per_second']:.0f} tokens/s, "
                f"{row.get('equal_queries')} of {row.get('queries')} answers equal"
            )
        elif row["case"].startswith("simulated"):
            lines.append(f"{row['case']}: tokens/s off by {row['tokens_per_second']:+.1%}")
    record.lines = lines
    record.headline = f"random Llama of {sizes}"


if __name__ == "__main__":
    run(relay)
