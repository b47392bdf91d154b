"""How much memory a KV cache takes, counted and measured."""

import gc
import mmap
import os
import re
import struct

import psutil
import pytest
import torch

from baton_kernels import kv_cache
from baton_kernels.kv_cache import KVCache
from baton_kernels.slot_memory import SlotMemory, huge_page_bytes
from baton_kernels.testing import storage

MIB = 2**20


def resident_pages(*tensors):
    """Pages of these tensors' memory that the system has committed, from the page table."""
    pages = 0
    with open("/proc/self/pagemap", "rb") as table:
        for tensor in tensors:
            begin, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
            table.seek(begin // mmap.PAGESIZE * 8)
            count = size // mmap.PAGESIZE
            # Bit 63: present, bit 62: swapped out.
            entries = struct.unpack(f"{count}Q", table.read(8 * count))
            pages += sum(entry >> 62 != 0 for entry in entries)
    return pages


def resident_bytes():
    gc.collect()
    return psutil.Process().memory_info().rss


def test_bytes_are_counted_exactly():
    # A column of one head is 64 * 2 bytes; a head has 8 pages.
    page = mmap.PAGESIZE
    columns = page // 128
    cache = KVCache(3, 4, 5, 8 * columns, 64, dtype=torch.bfloat16)
    assert cache.bytes_per_token == 2 * 3 * 5 * 64 * 2
    assert cache.bytes_reserved == 2 * 3 * 4 * 5 * 8 * page
    assert cache.bytes_in_use == cache.bytes_committed == 0
    per_head = 2 * 3 * 5 * page
    cache.allocate(0)
    assert cache.bytes_committed == 0
    cache.allocate(columns)
    assert cache.bytes_in_use == columns * cache.bytes_per_token
    assert cache.bytes_committed == per_head
    cache.extend([1])
    assert cache.bytes_in_use == (columns + 1) * cache.bytes_per_token
    assert cache.bytes_committed == 2 * per_head
    cache.extend([0], [5])
    assert cache.bytes_in_use == (columns + 6) * cache.bytes_per_token
    assert cache.bytes_committed == 3 * per_head
    cache.free(1)
    assert cache.bytes_in_use == 5 * cache.bytes_per_token
    assert cache.bytes_committed == 3 * per_head
    cache.allocate(1, 1)
    assert cache.bytes_committed == 3 * per_head
    cache.free(1)
    cache.release()
    assert cache.bytes_committed == per_head
    cache.resize(8)
    assert cache.bytes_reserved == 2 * 3 * 8 * 5 * 8 * page
    assert cache.bytes_committed == per_head


@pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
@pytest.mark.parametrize(
    "sizes",
    [(2, 5, 3, 100, 16), (1, 3, 2, 1000, 64), (3, 2, 5, 7, 24), (2, 3, 1, 4096, 16)],
    ids=str,
)
def test_committed_pages_are_those_counted(sizes, aligned):
    """The page table agrees with the count, where heads share pages and where they do not."""
    layers, slots, heads, capacity, head_dim = sizes
    cache = KVCache(*sizes, dtype=torch.bfloat16, aligned=aligned)

    def pages():
        return resident_pages(cache.keys, cache.values) * mmap.PAGESIZE

    def insert(tokens):
        key = torch.ones(layers, tokens, heads, head_dim, dtype=torch.bfloat16)
        return cache.insert(key, key)

    assert pages() == cache.bytes_committed == 0
    first = insert(capacity // 3)
    assert pages() == cache.bytes_committed > 0
    second = insert(capacity // 2)
    assert pages() == cache.bytes_committed
    cache.free(first)
    cache.trim()
    assert pages() == cache.bytes_committed
    cache.release()
    assert pages() == cache.bytes_committed
    committed = cache.bytes_committed
    cache.resize(slots + 2)
    assert pages() == cache.bytes_committed <= committed
    insert(capacity)
    cache.free(second)
    assert pages() == cache.bytes_committed
    for slot in cache.shape.used:
        cache.free(slot)
    cache.release()
    assert pages() == cache.bytes_committed == 0


def test_committed_columns_are_tracked_per_slot(monkeypatch):
    # A column of keys is 128 bytes, a slot four pages; both keys and values count.
    per_page = mmap.PAGESIZE // 128
    cache = KVCache(1, 4, 1, 4 * per_page, 64, dtype=torch.bfloat16, aligned=True)
    long, short = (torch.ones(1, n, 1, 64, dtype=torch.bfloat16) for n in (4 * per_page, per_page))

    def pages():
        return cache.bytes_committed / (2 * mmap.PAGESIZE)

    cache.insert(long, long)
    assert pages() == 4
    cache.insert(short, short)
    assert cache.shape.start(1) == 3 * per_page
    assert pages() == 4 + 1
    # Moved left: the former columns keep their pages, and those in between count too.
    cache.free(0)
    cache.trim()
    assert cache.shape.start(1) == 0
    assert pages() == 4 + 4
    # A new mapping has only the valid columns.
    cache.resize(3)
    assert pages() == 1

    # Written before the moves failed: in no row, but the pages are committed.
    def broken(*_):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(kv_cache, "move_kv", broken)
        cache.insert(long, long)
    assert cache.shape.used == (1,)
    assert pages() == 4 + 1


@pytest.mark.alone  # huge pages come and go with the memory that others take
def test_resident_set_follows_what_is_written():
    """Reserving four GiB costs nothing; tokens take pages; releasing returns them."""
    before = resident_bytes()
    cache = KVCache(8, 64, 8, 2048, 64, dtype=torch.float32)
    assert cache.bytes_reserved == 4096 * MIB
    assert resident_bytes() - before < 4 * MIB
    key = torch.ones(8, 512, 8, 64)
    before = resident_bytes()
    for _ in range(4):
        cache.insert(key, key)
    assert cache.bytes_in_use == cache.bytes_committed == 64 * MIB
    assert abs(resident_bytes() - before - 64 * MIB) < 4 * MIB
    for slot in (1, 2, 3):
        cache.free(slot)
    assert cache.bytes_committed == 64 * MIB
    cache.release()
    assert cache.bytes_committed == 16 * MIB
    assert abs(resident_bytes() - before - 16 * MIB) < 4 * MIB
    cache.resize(80)
    assert cache.bytes_reserved == 5120 * MIB
    assert abs(resident_bytes() - before - 16 * MIB) < 4 * MIB
    before = resident_bytes()
    del cache
    assert abs(before - resident_bytes() - 16 * MIB) < 4 * MIB


def test_memory_lives_as_long_as_its_last_view():
    cache = KVCache(1, 1, 1, 2**16, 64)
    cache.keys.fill_(1.0)
    cache.values.fill_(2.0)
    before = resident_bytes()
    view = cache.layer(0)[1]
    del cache
    assert abs(before - resident_bytes() - 16 * MIB) < 4 * MIB
    assert view[0, 0, -1, -1].item() == 2.0
    del view
    assert abs(before - resident_bytes() - 32 * MIB) < 4 * MIB


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"),
    reason="needs a kernel with huge pages",
)
def test_huge_pages_are_refused():
    """Otherwise the first column of a slot would commit 2 MiB on systems that always use them."""
    memory = SlotMemory((1, 1, 1, 2**16, 64), torch.float32, torch.device("cpu"))
    memory.tensor[..., 0, :] = 1.0
    within = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                begin, end = (int(bound, 16) for bound in match.groups())
                within = begin <= memory.tensor.data_ptr() < end
            elif within and line.startswith("VmFlags:"):
                assert "nh" in line.split()
                return
    raise AssertionError("the mapping is not in /proc/self/smaps")


def test_no_page_belongs_to_two_slots():
    memory = SlotMemory((2, 3, 5, 7, 24), torch.float16, torch.device("cpu"))
    assert memory.tensor.shape == (2, 3, 5, 7, 24)
    for layer in range(2):
        for slot in range(3):
            assert memory.tensor[layer, slot].data_ptr() % mmap.PAGESIZE == 0
            assert memory.tensor[layer, slot].is_contiguous()
    assert memory.num_bytes == 2 * 3 * mmap.PAGESIZE * -(-5 * 7 * 24 * 2 // mmap.PAGESIZE)
    assert storage(memory.tensor).numel() * 2 == memory.num_bytes


def test_huge_pages_are_whole_slots():
    """Committed, counted and returned huge page by huge page."""
    huge = huge_page_bytes()
    sizes = (2, 3, 2, 100, 64)
    memory = SlotMemory(sizes, torch.bfloat16, torch.device("cpu"), huge_pages=True)
    assert memory.num_bytes == 2 * 3 * huge
    for layer in range(2):
        for slot in range(3):
            assert memory.tensor[layer, slot].data_ptr() % huge == 0
            assert memory.tensor[layer, slot].is_contiguous()
    assert memory.committed([(0, 1)]) == memory.committed([(3, 99)]) == 2 * huge
    memory.tensor.fill_(1.0)
    memory.release(1)
    # If Linux has no huge page to spare, it commits small ones, only where columns were written.
    assert resident_pages(memory.tensor) * mmap.PAGESIZE <= 2 * 2 * huge
    assert (memory.tensor[:, 0] == 1).all() and (memory.tensor[:, 2] == 1).all()


def test_cache_of_huge_pages_is_a_cache():
    """Rows enter, grow, leave and are released as with small pages, with the same bits."""
    caches = [KVCache(2, 3, 2, 100, 64, huge_pages=huge) for huge in (False, True)]
    kept = []
    for cache in caches:
        generator = torch.Generator().manual_seed(0)
        for tokens in (40, 100, 7):
            key = torch.randn(2, tokens, 2, 64, generator=generator)
            cache.insert(key, -key)
        cache.free(1)
        cache.release()
        cache.resize(4)
        kept.append([*cache.extract(0), *cache.extract(2)])
    for small, huge in zip(*kept, strict=True):
        assert torch.equal(small, huge)
    assert caches[1].bytes_committed == 2 * 2 * 2 * huge_page_bytes()


@pytest.mark.parametrize("sizes", [(2, 3, 2, 256, 64), (1, 2, 3, 100, 24)])
def test_columns_below_one_are_given_back(sizes):
    """Frees whole pages of every head, and nothing at or above the column."""
    column = 70
    memory = SlotMemory(sizes, torch.float32, torch.device("cpu"))
    memory.tensor.fill_(1.0)
    before = resident_pages(memory.tensor)
    memory.release_below(1, column)
    freed = before - resident_pages(memory.tensor)
    kept = memory.tensor.clone()
    kept[:, 1, :, :column] = 1
    assert (kept == 1).all()
    lost = (memory.tensor[:, 1, :, :column] == 0).all(-1).sum().item()
    assert lost > 0
    # At most two pages of each head stay.
    assert freed >= sizes[0] * sizes[2] * (column * sizes[4] * 4 // mmap.PAGESIZE - 2)
    assert freed * mmap.PAGESIZE >= lost * sizes[4] * 4


def test_a_cache_gives_columns_back():
    cache = KVCache(2, 2, 2, 256, 64)
    key = torch.randn(2, 200, 2, 64)
    for _ in range(2):
        cache.insert(key, -key)
    committed = cache.bytes_committed
    cache.release_below(0, 128)
    assert cache.bytes_committed < committed
    for kept, whole in zip(cache.extract(0), (key, -key), strict=True):
        assert torch.equal(kept[:, 128:], whole[:, 128:])
    for kept, whole in zip(cache.extract(1), (key, -key), strict=True):
        assert torch.equal(kept, whole)
    for arguments, message in (((2, 0), "slot must be from 0 to 1"), ((0, 257), "column must be")):
        with pytest.raises(ValueError, match=f"KVCache.release_below: {message}"):
            cache.release_below(*arguments)
    with pytest.raises(TypeError, match="column must be an integer"):
        cache.release_below(0, 1.5)
