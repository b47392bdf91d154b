"""Decode attention as CUDA graphs, compared with its peers and with reading the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton_kernels import ragged_attention

from ..kernels import peers
from ..kernels.attention_cases import decode_lengths
from ..kernels.attention_work import AttentionWork, Heads
from ..kernels.cuda_peers import decode_peers
from ..kernels.measure import LIMIT, OURS, Way
from ..kernels.paged_cases import Pages
from .device import Stage, run
from .rates import READ_BYTES, read_rate
from .rates import words as random_words
from .timing import beside_peers, our_us, time_ways

LLAMA = Heads(32, 8, 128)
# Shapes that are also read from pages, and the columns of a page.
PAGED, PAGES = ("32 x 2k", "32 mixed, 128 to 2048"), (16, 128)
# Compiling it takes most of a minute per shape.
FLEX = ("32 x 2k", "8 x 8k")


class Sizes:
    """A device with the fields that `AttentionWork` needs."""

    def __init__(self, stage: Stage):
        self.name = stage.device
        self.cache_bytes = 1
        if stage.device == "cuda":
            self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size


def shapes() -> Iterator[tuple[str, Heads, list[int], dict]]:
    """Label, heads, lengths and options, in order of importance."""
    k = 1024
    mixed = decode_lengths(32, 128, 2048, 686)
    yield "32 x 2k", LLAMA, [2 * k] * 32, {}
    yield "32 mixed, 128 to 2048", LLAMA, mixed, {}
    yield "1 x 32k", LLAMA, [32 * k], {}
    yield "8 x 1k", LLAMA, [k] * 8, {}
    yield "1 x 2k", LLAMA, [2 * k], {}
    yield "8 x 8k", LLAMA, [8 * k] * 8, {}
    yield "32 x 8k", LLAMA, [8 * k] * 32, {}
    yield "128 x 1k", LLAMA, [k] * 128, {}
    yield "1 x 128k", LLAMA, [128 * k], {}
    yield "32 mixed, bound of 32k", LLAMA, mixed, {"max_length": 32 * k}
    yield "32 mixed, no bounds", LLAMA, mixed, {"max_length": None, "max_query_length": None}
    yield "32 mixed, MHA 32/32", Heads(32, 32, 128), mixed, {}
    yield "32 mixed, MQA 32/1", Heads(32, 1, 128), mixed, {}
    yield "32 mixed, 64 dims", Heads(32, 8, 64), mixed, {}
    yield "8 x 8k, window of 1k", LLAMA, [8 * k] * 8, {"window": k}
    yield "128 x 8k", LLAMA, [8 * k] * 128, {}
    yield "8 x 128k", LLAMA, [128 * k] * 8, {}


def ways(work: AttentionWork, options: dict, flex: bool, paged: bool) -> list[Way]:
    """Our op and the peers that run here."""
    ours = Way(
        "ragged_attention", work.calls(ragged_attention, **options), work.check, OURS,
        work.poison_padding,
    )  # fmt: skip
    # Pages are a separate kind: neither the row's figure nor a peer.
    found = [ours] + [
        Way(f"in pages of {page}", Pages(work, page, False).calls(), work.check, "paged")
        for page in (PAGES if paged else ())
    ]
    if work.device == "cpu":
        return [*found, peers.row_sdpa(work)]
    if not options:
        found += decode_peers(work)
    if flex:
        found.append(peers.flex_attention(work))
    return found


@torch.inference_mode()
def decode(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    source = random_words(stage)
    rate, how = read_rate(stage, source)
    if record.wants("read"):
        record.add("read", gb_per_s=rate / 1e9, by=how)
    sizes = Sizes(stage)
    for label, heads, lengths, options in shapes():
        # Flex comes last, because its compilation may take all the remaining time.
        if record.wants(label, 3.0):
            with record.attempt(label):
                measure(stage, sizes, label, heads, lengths, options, rate, source)
    for label, heads, lengths, _ in shapes() if stage.device == "cuda" else ():
        if label in FLEX and record.wants(f"{label}, Flex", 40.0):
            with record.attempt(f"{label}, Flex"):
                measure(stage, sizes, f"{label}, Flex", heads, lengths, {}, rate, source, True)
    shares = [row for row in record.rows if row.get("share")]
    record.headline = f"{len(shares)} shapes; share of {rate / 1e9:.0f} GB/s read by {how}"
    record.lines = [
        f"{row['case']:24} {row['share']:4.0%} of the read rate; {row['beside']}" for row in shares
    ]


def measure(
    stage: Stage,
    sizes: Sizes,
    label: str,
    heads: Heads,
    lengths: list[int],
    options: dict,
    rate: float,
    source: torch.Tensor,
    flex: bool = False,
) -> None:
    """One row of the table."""
    options = dict(options)
    window = options.pop("window", None)
    if stage.small:
        lengths = [max(1, n // 256) for n in lengths[:4]]
        window = window and 4
    work = AttentionWork(
        heads, [1] * len(lengths), lengths, dtype=stage.dtype, device=sizes, window=window
    )
    reader = Way("read of the same bytes", reads(source, work), kind=LIMIT)
    found = time_ways([*ways(work, options, flex, label in PAGED), reader], stage.device)
    us = our_us(found)
    bytes_per_s = us and 1e6 * work.bytes / us
    stage.record.add(
        label, heads=str(heads), rows=len(lengths), bytes=work.bytes, layers=work.layers,
        ways=found, gb_per_s=us and bytes_per_s / 1e9, share=us and bytes_per_s / rate,
        beside=beside_peers(found) + beside_slots(found),
    )  # fmt: skip


def beside_slots(found: list[dict]) -> str:
    """Times in pages as multiples of the time in slots, as text."""
    us = our_us(found)
    return "".join(
        f"; {way['way']} {way['us'] / us:.2f}x" for way in found
        if way["kind"] == "paged" and way.get("us") and us
    )  # fmt: skip


def reads(source: torch.Tensor, work: AttentionWork) -> list:
    """Calls that read the same number of bytes from other memory, one per layer of the work."""
    from ..kernels.cuda import readers

    read = next(iter(readers().values()))
    count = max(1, min(work.bytes, READ_BYTES, source.nbytes) // 4)
    places = max(1, len(source) // count)
    return [
        lambda first=layer % places * count: read(source[first : first + count])
        for layer in range(work.layers)
    ]


if __name__ == "__main__":
    run(decode)
