"""Reads and writes of the emulated kernels, counted access by access.

The judge is told which columns of each row a call may access. Any other access, e.g. to padding or
to keys that no token sees, is an error. For the allowed ones it counts bytes, 32-byte sectors, and
wavefronts of shared memory.
"""

import pytest
import torch

from baton_kernels.testing import attention_problem, cumulative, int32, random_rows
from emulation.cuda.backends import EMULATED
from emulation.cuda.ops import EmulationError

OPS = EMULATED["cuda-judged"]
NUM_HEADS, NUM_KV_HEADS = 8, 2
# Kernel: dtype, query tokens per row, query vectors per block tile, keys that it reads at once.
DECODE = (torch.bfloat16, 1, 8, 16)
PREFILL = (torch.bfloat16, 48, 128, 1)
GENERIC = (torch.float32, 3, 4, 1)
KERNELS = pytest.mark.parametrize(
    ("dtype", "query_length", "tile", "step"), [DECODE, PREFILL, GENERIC],
    ids=["decode", "prefill", "generic"],
)  # fmt: skip


def sum_of(traffic, what, beginning=""):
    return sum(entry[what] for name, entry in traffic.items() if name.startswith(beginning))


def visible(query_length, length, window, tile):
    """Key ranges [begin, end) of the tiles of a causal row; no token in a tile sees more."""
    group = NUM_HEADS // NUM_KV_HEADS
    vectors = query_length * group
    for first in range(0, vectors, tile):
        last = min(first + tile, vectors) - 1
        position = length - query_length
        end = position + last // group + 1
        begin = 0 if window is None else max(position + first // group + 1 - window, 0)
        yield max(begin, 0), end


def attend(rows, query_length, tile, **options):
    """A call in which each row and KV head is a part of the caches; returns what it loads, and what
    it has to load."""
    problem = attention_problem(rows, margins=(0, 0, 0, 0))
    expected, parts = {}, {"key_cache": {}, "value_cache": {}}
    places = zip(
        problem.slots.tolist(), problem.starts.tolist(), problem.lengths.tolist(), strict=True
    )
    for row, (slot, start, length) in enumerate(places):
        ranges = list(visible(query_length, length, options.get("window"), tile))
        begin, end = min(b for b, _ in ranges), max(e for _, e in ranges)
        for cache, views in parts.items():
            tensor = getattr(problem, cache)
            column = tensor.shape[-1] * tensor.element_size()
            for head in range(NUM_KV_HEADS):
                name = f"{cache} row {row} head {head}"
                views[name] = tensor[slot, head, start + begin : start + end]
                expected[name] = column * sum(e - b for b, e in ranges)
    OPS.traffic()
    with OPS.entered(), OPS.only(**parts):
        OPS.ragged_attention(*problem.args, max_query_length=query_length, **options)
    loads, stores = OPS.traffic()
    return loads, stores, expected


def rows_of(lengths, query_length, dtype, head_dim=128):
    return random_rows(
        [query_length] * len(lengths), lengths, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 64, 112])
@KERNELS
def test_keys_and_values_are_read_once_per_kv_head(dtype, query_length, tile, step, window):
    """Keys are loaded once for all query heads of a tile, split or not; nothing else in the caches
    is touched, and keys before the window or after the last query are not loaded to be masked."""
    rows = rows_of([1040, 512, 128, 64], query_length, dtype)
    options = {} if window is None else {"window": window}
    loads, _, expected = attend(rows, query_length, tile, **options)
    for name, num_bytes in expected.items():
        assert loads[name]["bytes"] == num_bytes, name
    if dtype == torch.float32:
        return  # a lane takes the halves of a sector one after the other
    sectors = sum_of(loads, "sectors", "key_cache") + sum_of(loads, "sectors", "value_cache")
    assert 32 * sectors <= 1.05 * sum(expected.values())


@KERNELS
def test_of_other_lengths_the_last_key_alone_is_read_again(dtype, query_length, tile, step):
    """If a step ends in padding, columns outside the row are never read."""
    rows = rows_of([1051, 517, 99, 49], query_length, dtype)
    loads, _, expected = attend(rows, query_length, tile)
    for name, num_bytes in expected.items():
        column = 128 * dtype.itemsize
        assert num_bytes <= loads[name]["bytes"] <= num_bytes + (step - 1) * column, name


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("dtype", "query_length", "tile", "step"), [DECODE, PREFILL],
                         ids=["decode", "prefill"])  # fmt: skip
def test_shared_memory_has_few_conflicts(dtype, query_length, tile, step, head_dim):
    """The generic kernel uses it once, after its last key."""
    rows = rows_of([600, 70], query_length, dtype, head_dim)
    loads, stores, _ = attend(rows, query_length, tile)
    wavefronts = loads["shared"]["wavefronts"] + stores["shared"]["wavefronts"]
    ideal = loads["shared"]["ideal_wavefronts"] + stores["shared"]["ideal_wavefronts"]
    # Ten chunks of 16 bytes: eight copying lanes do not end where a row does.
    limit = 1.13 if (head_dim, query_length) == (80, 48) else 1.1
    assert wavefronts <= limit * ideal


def test_a_column_too_many_is_an_error():
    """Checks the judge that the tests above rely on."""
    problem = attention_problem(rows_of([64], 1, torch.bfloat16))
    slot, start = problem.slots.item(), problem.starts.item()
    parts = {
        f"{name} {head}": getattr(problem, name)[slot, head, start : start + 63]
        for name in ("key_cache", "value_cache") for head in range(NUM_KV_HEADS)
    }  # fmt: skip
    keys = {name: x for name, x in parts.items() if name.startswith("key")}
    values = {name: x for name, x in parts.items() if name.startswith("value")}
    with (
        OPS.entered(),
        OPS.only(key_cache=keys, value_cache=values),
        pytest.raises(EmulationError, match="outside of every tensor: read of 16 bytes"),
    ):
        OPS.ragged_attention(*problem.args)


@pytest.mark.parametrize("op", ["insert_kv", "extract_kv", "move_kv", "append_kv"])
def test_copies_touch_their_own_columns_once(op):
    """The benchmark's heads, and starts that are not a multiple of anything."""
    heads, head_dim, tokens = 8, 128, 70
    starts, lengths = [3, 0, 17], [40, 1, 29]
    caches = [torch.randn(2, 4, heads, 64, head_dim).bfloat16() for _ in range(2)]
    packed = [torch.randn(2, tokens, heads, head_dim).bfloat16() for _ in range(2)]
    if op == "append_kv":
        caches, packed = [x[0] for x in caches], [x[0, :3] for x in packed]
        lengths = [1, 1, 1]
    slots = [2, 0, 3]

    def columns(cache, name):
        layers = [cache] if cache.dim() == 4 else list(cache)
        return {
            f"{name} {layer} {slot} {head}": x[slot, head, start : start + length]
            for layer, x in enumerate(layers) for head in range(heads)
            for slot, start, length in zip(slots, starts, lengths, strict=True)
        }  # fmt: skip

    parts = {
        name: columns(cache, name)
        for name, cache in zip(("key_cache", "value_cache"), caches, strict=True)
    }
    index = int32(slots), int32(starts)
    OPS.traffic()
    with OPS.entered(), OPS.only(**parts):
        if op == "insert_kv":
            OPS.insert_kv(*packed, *caches, cumulative(lengths), *index)
        elif op == "extract_kv":
            OPS.extract_kv(*caches, cumulative(lengths), *index, total_tokens=tokens)
        elif op == "append_kv":
            OPS.append_kv(*packed, *caches, *index)
        else:
            # Moves by one column within the same columns, forwards and backwards.
            moves = [3, 0, 18], slots, [4, 0, 17], [39, 0, 28]
            OPS.move_kv(*caches, index[0], *(int32(x) for x in moves))
    loads, stores = OPS.traffic()
    useful = sum(x.nbytes for views in parts.values() for x in views.values())
    if op == "move_kv":
        useful = useful // sum(lengths) * (39 + 28)
    assert sum_of(stores, "bytes") == useful
    assert 32 * sum_of(stores, "sectors") <= 1.05 * useful
    assert 32 * (sum_of(loads, "sectors", "key") + sum_of(loads, "sectors", "value")) <= (
        1.05 * useful
    )
