import pytest
import torch

from baton_kernels import kv_cache, slot_memory
from baton_kernels.kv_cache import KVCache
from baton_kernels.testing import DTYPES, assert_same_bits, embed, storage

BOTH = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])


def query(tokens, *, layers=2, heads=3, head_dim=16, dtype=torch.float32, seed=0):
    """Keys and values of a query, as slices of larger tensors that are NaN everywhere else."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    shape = (layers, tokens, heads, head_dim)
    return tuple(embed(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))


def small(aligned, dtype=torch.float32):
    """Two layers, four slots, eight columns; all of its memory is NaN."""
    cache = KVCache(2, 4, 3, 8, 16, dtype=dtype, aligned=aligned)
    for tensor in (cache.keys, cache.values):
        storage(tensor).fill_(float("nan"))
    return cache


def filled(aligned):
    """Slot 0 holds five tokens, slot 2 three, and slot 1 has held one that left again."""
    cache = small(aligned)
    queries = {slot: query(n, seed=slot) for slot, n in ((0, 5), (1, 1), (2, 3))}
    for slot, (key, value) in queries.items():
        assert cache.insert(key, value) == slot
    cache.free(1)
    del queries[1]
    return cache, queries


def assert_rows(cache, queries):
    assert cache.shape.used == tuple(sorted(queries))
    for slot, expected in queries.items():
        for got, want, name in zip(cache.extract(slot), expected, ("key", "value"), strict=True):
            assert_same_bits(got, want, f"{name} of slot {slot}")


class Unchanged:
    """Within the block nothing of the cache changes: shape, tensors, bits, accounting."""

    def __init__(self, cache, *, memory=True):
        self.cache, self.memory = cache, memory

    def state(self):
        cache = self.cache
        identities = [id(x) for x in (cache.keys, cache.values, cache.shape)]
        return (cache.shape.copy(), cache.bytes_reserved, cache.bytes_in_use, identities)

    def content(self):
        cache = self.cache
        bits = [storage(x).view(torch.int32).clone() for x in (cache.keys, cache.values)]
        return (cache.bytes_committed, *bits)

    def __enter__(self):
        self.before = self.state(), self.content()

    def __exit__(self, *_):
        state, (committed, *tensors) = self.before
        assert self.state() == state
        if self.memory:
            committed_now, *tensors_now = self.content()
            assert committed_now == committed
            assert all(map(torch.equal, tensors_now, tensors))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_back_unpadded_as_they_went_in(dtype, aligned):
    cache = small(aligned, dtype)
    queries = {}
    for slot, tokens in enumerate((3, 5, 0, 8)):
        queries[slot] = query(tokens, dtype=dtype, seed=slot)
        assert cache.insert(*queries[slot]) == slot
        assert_rows(cache, queries)
    assert cache.extract(2)[0].shape == (2, 0, 3, 16)
    assert cache.keys.dtype == cache.extract(0)[1].dtype == dtype


def test_hand_computed_example():
    cache = KVCache(1, 2, 1, 4, 16, aligned=True)
    for tensor in (cache.keys, cache.values):
        tensor.fill_(-1.0)
    one = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 1, 16).contiguous()
    other = torch.tensor([3.0, 4.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, 1, 16).contiguous()
    cache.insert(one, one + 10)
    cache.insert(other, other + 10)
    assert cache.keys[0, :, 0, :, 7].tolist() == [[1, 1, 2, -1], [3, 4, 5, -1]]
    assert cache.values[0, :, 0, :, 7].tolist() == [[11, 11, 12, -1], [13, 14, 15, -1]]
    assert (cache.shape.start(0), cache.shape.end(0)) == (1, 3)
    cache.free(1)
    cache.trim()
    assert (cache.shape.start(0), cache.shape.end(0)) == (0, 2)
    assert cache.keys[0, 0, 0, :2, 7].tolist() == [1, 2]
    key, value = cache.extract(0)
    assert key[0, :, 0, 0].tolist() == [1, 2]
    assert value[0, :, 0, 15].tolist() == [11, 12]


@BOTH
def test_layers_are_views(aligned):
    cache, queries = filled(aligned)
    for layer in range(2):
        key_cache, value_cache = cache.layer(layer)
        assert key_cache.shape == value_cache.shape == (4, 3, 8, 16)
        columns = slice(cache.shape.start(2), cache.shape.end(2))
        assert_same_bits(key_cache[2, :, columns].transpose(0, 1), queries[2][0][layer])
        assert_same_bits(value_cache[2, :, columns].transpose(0, 1), queries[2][1][layer])
        value_cache[2, :, columns] = layer
    assert [cache.extract(2)[1][layer].unique().tolist() for layer in range(2)] == [[0], [1]]


@BOTH
def test_rows_written_by_the_caller(aligned):
    """allocate and extend make room, and rows already there move with their content."""
    cache, queries = filled(aligned)
    slot = cache.allocate(7)
    assert slot == 1
    key, value = query(8, seed=7)
    first, end = cache.shape.start(slot), cache.shape.end(slot)
    cache.keys[:, slot, :, first:end] = key[:, :7].transpose(1, 2)
    cache.values[:, slot, :, first:end] = value[:, :7].transpose(1, 2)
    queries[slot] = key[:, :7], value[:, :7]
    assert_rows(cache, queries)

    cache.extend(cache.shape.used)
    for used in cache.shape.used:
        last = cache.shape.end(used) - 1
        cache.keys[:, used, :, last] = key[:, 7]
        cache.values[:, used, :, last] = value[:, 7]
        queries[used] = tuple(
            torch.cat([row, new[:, 7:]], 1)
            for row, new in zip(queries[used], (key, value), strict=True)
        )
    assert_rows(cache, queries)


def test_extend_shifts_left_at_the_capacity():
    cache, queries = filled(True)
    cache.extend([0, 2], [3, 3])
    cache.free(0)
    before = cache.extract(2)
    cache.extend([2])
    assert cache.shape.end(2) == 7
    cache.keys[:, 2, :, 6:] = float("nan")
    for got, want in zip(cache.extract(2), before, strict=True):
        assert_same_bits(got[:, :3], want[:, :3])


@BOTH
def test_parked_and_resumed(aligned):
    cache, queries = filled(aligned)
    parked = cache.extract(0)
    cache.free(0)
    cache.insert(*query(4, seed=9), slot=0)
    assert cache.insert(*parked, slot=3) == 3
    assert_rows(cache, {0: query(4, seed=9), 2: queries[2], 3: queries[0]})


REFUSED = {
    "allocate too long": (lambda c: c.allocate(9), ValueError, "BatchShape.allocate: length"),
    "allocate a used slot": (lambda c: c.allocate(8, 2), ValueError, "slot must be free, got 2"),
    "extend an unused slot": (lambda c: c.extend([0, 1, 2]), ValueError, "slot must be in use"),
    "extend past the capacity": (lambda c: c.extend([0, 2], [4, 4]), ValueError, "counts must be"),
    "insert too long": (lambda c: c.insert(*query(9)), ValueError, "length must be from 0 to 8"),
    "insert into a used slot": (lambda c: c.insert(*query(8), slot=0), ValueError, "slot must be"),
    "insert a float slot": (lambda c: c.insert(*query(8), slot=1.0), TypeError, "slot must be an"),
    "key of three dimensions": (
        lambda c: c.insert(query(2)[0][0], query(2)[1][0]),
        ValueError,
        r"KVCache.insert: key must be a 4-D tensor, got shape \[2, 3, 16\]",
    ),
    "key of other heads": (
        lambda c: c.insert(*query(2, heads=4)),
        ValueError,
        r"KVCache.insert: key must be of shape \[2, 2, 3, 16\], got \[2, 2, 4, 16\]",
    ),
    "value of other layers": (
        lambda c: c.insert(query(2)[0], query(2, layers=1)[1]),
        ValueError,
        r"KVCache.insert: value must be of shape \[2, 2, 3, 16\], got \[1, 2, 3, 16\]",
    ),
    "value of another length": (
        lambda c: c.insert(query(2)[0], query(3)[1]),
        ValueError,
        r"KVCache.insert: value must be of shape \[2, 2, 3, 16\], got \[2, 3, 3, 16\]",
    ),
    "key of another dtype": (
        lambda c: c.insert(query(8)[0].half(), query(8)[1]),
        TypeError,
        "KVCache.insert: key must be float32 .*, got float16",
    ),
    "value on another device": (
        lambda c: c.insert(query(8)[0], query(8)[1].to("meta")),
        ValueError,
        "KVCache.insert: value must be on the cpu.*, got meta",
    ),
    "key that is not a tensor": (lambda c: c.insert([1], [1]), TypeError, "key must be a tensor"),
    "key with strided vectors": (
        lambda c: c.insert(query(8, head_dim=32)[0][..., ::2], query(8)[1]),
        ValueError,
        "KVCache.insert: key must be contiguous in its last dimension, got stride 2",
    ),
    "extract a free slot": (lambda c: c.extract(1), ValueError, "slot must be in use, got 1"),
    "free a free slot": (lambda c: c.free(1), ValueError, "slot must be in use, got 1"),
    "drop a used slot": (lambda c: c.resize(2), ValueError, "num_slots must be at least 3"),
    "layer out of range": (lambda c: c.layer(2), ValueError, "KVCache.layer: index must be from 0"),
    "negative layer": (lambda c: c.layer(-1), ValueError, "KVCache.layer: index must be from 0"),
}


@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case, aligned):
    call, error, text = REFUSED[case]
    cache, queries = filled(aligned)
    with Unchanged(cache), pytest.raises(error, match=text):
        call(cache)
    assert_rows(cache, queries)


@BOTH
def test_a_full_cache_takes_no_more(aligned):
    cache, _ = filled(aligned)
    cache.allocate(1)
    cache.allocate(0)
    with Unchanged(cache), pytest.raises(ValueError, match="num_slots must be more than the rows"):
        cache.insert(*query(8))


FAILING_OPS = {
    "insert": ("insert_kv", (), lambda c: c.insert(*query(2))),
    "insert that would move": ("insert_kv", (), lambda c: c.insert(*query(7))),
    "insert that moves": ("move_kv", (), lambda c: c.insert(*query(7))),
    "allocate that moves": ("move_kv", (), lambda c: c.allocate(7)),
    "extend that moves": ("move_kv", (0,), lambda c: c.extend([2], [4])),
    "trim that moves": ("move_kv", (0,), lambda c: c.trim()),
    "extract": ("extract_kv", (), lambda c: c.extract(0)),
}


@pytest.mark.parametrize("case", FAILING_OPS)
def test_a_failing_op_leaves_cache_and_shape(case, monkeypatch):
    op, leaving, call = FAILING_OPS[case]
    cache, queries = filled(True)
    for slot in leaving:
        cache.free(slot)
        del queries[slot]

    def broken(*_, **__):
        raise RuntimeError("the device is gone")

    # A new row that was written before its moves failed is padding; nothing else may differ.
    with Unchanged(cache, memory=case != "insert that moves"), monkeypatch.context() as patch:
        patch.setattr(kv_cache, op, broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            call(cache)
    assert_rows(cache, queries)
    queries[cache.insert(*query(7, seed=4))] = query(7, seed=4)
    assert_rows(cache, queries)


@BOTH
def test_resize_keeps_rows(aligned):
    cache, queries = filled(aligned)
    shape, keys = cache.shape, cache.keys
    cache.resize(4)
    assert cache.keys is keys
    for num_slots in (9, 3):
        cache.resize(num_slots)
        assert cache.keys.shape == cache.values.shape == (2, num_slots, 3, 8, 16)
        assert cache.shape is shape
        assert cache.shape.num_slots == num_slots
        assert_rows(cache, queries)
    cache.free(2)
    cache.resize(1)
    assert_rows(cache, {0: queries[0]})
    cache.resize(2)
    assert cache.insert(*query(8)) == 1
    assert_rows(cache, {0: queries[0], 1: query(8)})


def test_resize_without_memory_changes_nothing(monkeypatch):
    cache, queries = filled(False)

    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    with Unchanged(cache), monkeypatch.context() as patch:
        patch.setattr(slot_memory.mmap, "mmap", refuse)
        with pytest.raises(MemoryError, match=r"KVCache: \d+ bytes could not be reserved"):
            cache.resize(9)
    assert_rows(cache, queries)


@BOTH
def test_release_keeps_rows(aligned):
    cache, queries = filled(aligned)
    cache.release()
    assert_rows(cache, queries)
    cache.insert(*query(8, seed=5))
    queries[1] = query(8, seed=5)
    assert_rows(cache, queries)


@pytest.mark.parametrize(
    ("error", "sizes", "options", "text"),
    [
        (ValueError, (0, 4, 3, 8, 16), {}, "KVCache: num_layers must be at least 1, got 0"),
        (ValueError, (2, 0, 3, 8, 16), {}, "BatchShape: num_slots must be from 1 .*, got 0"),
        (ValueError, (2, 4, 0, 8, 16), {}, "KVCache: num_kv_heads must be at least 1, got 0"),
        (ValueError, (2, 4, 3, 0, 16), {}, "BatchShape: capacity must be from 1 .*, got 0"),
        (ValueError, (2, 4, 3, 8, 0), {}, "KVCache: head_dim must be at least 1, got 0"),
        (NotImplementedError, (2, 4, 3, 8, 20), {}, "KVCache: head_dim must be .*, got 20"),
        (TypeError, (2.0, 4, 3, 8, 16), {}, "KVCache: num_layers must be an integer, got 2.0"),
        (
            TypeError,
            (2, 4, 3, 8, 16),
            {"dtype": torch.float64},
            "KVCache: dtype must be float32, float16, bfloat16, int8 or float8_e4m3fn, got float64",
        ),
        (MemoryError, (2, 2**30, 3, 2**20, 16), {}, "KVCache: .* bytes could not be reserved"),
        (MemoryError, (2, 2**31 - 1, 3, 2**31 - 1, 16), {}, "KVCache: .* bytes could not be"),
    ],
)
def test_bad_construction(error, sizes, options, text):
    with pytest.raises(error, match=f"^{text}"):
        KVCache(*sizes, **options)


def test_other_devices_are_allocated_whole():
    cache = KVCache(2, 4, 3, 8, 16, dtype=torch.float16, device="meta")
    assert cache.keys.device.type == "meta"
    assert cache.keys.is_contiguous()
    assert cache.bytes_reserved == cache.bytes_committed == 2 * 2 * 4 * 3 * 8 * 16 * 2
    cache.allocate(5)
    cache.extend([0])
    assert cache.bytes_in_use == 6 * cache.bytes_per_token
    cache.resize(6)
    cache.release()
    assert cache.keys.shape[1] == 6
    assert cache.bytes_committed == cache.bytes_reserved
