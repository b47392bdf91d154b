"""The ceiling of reading: a kernel that reads a GPU's memory and writes almost nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Words of 4 bytes that a program has in flight at a time: 16 loads of 16 bytes for each of its 128
# threads.
BLOCK = 8192
# Programs per multiprocessor, enough to keep the whole device busy until the end.
WAVES = 8


@triton.jit
def read_kernel(words_ptr, sums_ptr, num_words, BLOCK: tl.constexpr):
    """Program p sums the blocks p, p + programs, ...; sums wrap around."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(begin, num_words, step):
        at = first + lane
        total += tl.load(words_ptr + at, mask=at < num_words, other=0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def read(source: torch.Tensor, programs: int | None = None) -> torch.Tensor:
    """Reads all of `source`, int32 and contiguous; returns int32 sums of its parts."""
    if programs is None:
        properties = torch.cuda.get_device_properties(source.device)
        programs = properties.multi_processor_count * WAVES
    sums = torch.empty(programs, dtype=torch.int32, device=source.device)
    read_kernel[(programs,)](source, sums, source.numel(), BLOCK=BLOCK)
    return sums
