"""A KV cache under random operations, compared with a model of plain lists; padding is always NaN.

For a cache of another kind, KVCacheMachine has a subclass with what its rows hold of `vectors`; see
cache_machines.py.
"""

import copy
import pickle

import pytest
import torch
from counted import EVENTS, rule
from faulty_llama import INJECTED
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from numbered_tokens import HEADS, LAYERS, vectors

import baton_kernels
from baton_kernels import kv_cache
from baton_kernels.kv_cache import KVCache
from baton_kernels.testing import assert_same_bits, cumulative, int32, storage

CAPACITY = 9
MAX_SLOTS = 6
ANY_SLOT = st.integers(-1, MAX_SLOTS)
# Mostly a free slot, or most calls would be rejected.
WANTED_SLOT = st.none() | st.none() | st.none() | ANY_SLOT
ANY_LENGTH = st.integers(0, CAPACITY + 1)


class BrokenOpError(Exception):
    """Raised by an op that is made to fail."""


class KVCacheMachine(RuleBasedStateMachine):
    """The model: for every slot in use the numbers of its tokens, and the expected width.

    Token number n has the key and the value that ``vectors`` makes of n, of which a row has what
    ``held`` says.
    """

    aligned = False
    dtype = torch.float32
    head_dim = 16
    ops = baton_kernels

    def __init__(self):
        super().__init__()
        self.cache = self.new_cache(self.dtype)
        self.rows: dict[int, list[int]] = {}
        self.parked: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        self.num_slots = 3
        self.width = 0
        self.num_tokens = 0

    def new_cache(self, dtype):
        return KVCache(LAYERS, 3, HEADS, CAPACITY, self.head_dim, dtype=dtype, aligned=self.aligned)

    # Tokens, and where they are written

    def new_tokens(self, count):
        self.num_tokens += count
        return list(range(self.num_tokens - count, self.num_tokens))

    def vectors(self, tokens):
        """Keys and values ``[layers, tokens, heads, head_dim]`` of these tokens."""
        return vectors(tokens, self.head_dim, self.dtype)

    def held(self, tokens):
        """The result of ``extract`` for a row of these tokens."""
        return self.vectors(tokens)

    def alone(self, tokens):
        """Key and value cache of the last layer with one slot, which these tokens fill, by name;
        and their scales."""
        key, value = (x[-1].transpose(0, 1)[None] for x in self.vectors(tokens))
        return {"key_cache": key, "value_cache": value}

    def tensors(self, cache):
        """All that a cache writes."""
        return [cache.keys, cache.values]

    def poison(self, cache, padding):
        """Fills the columns that are true in ``padding [slots, columns]``, which none may read."""
        for tensor in self.tensors(cache):
            tensor.masked_fill_(padding[:, None, :, None], float("nan"))

    def write(self, slot, tokens):
        """Writes the last tokens of a row through the op, like a prefill into the slot."""
        start = self.cache.shape.end(slot) - len(tokens)
        index = cumulative([len(tokens)]), int32([slot]), int32([start])
        self.ops.insert_kv(
            *self.vectors(tokens), self.cache.keys, self.cache.values, *index, **self.cache.scales()
        )

    def padding(self):
        return (self.common_start() if self.rows else self.width) if self.aligned else 0

    def common_start(self):
        return self.width - max(map(len, self.rows.values()))

    def free_slots(self):
        return [slot for slot in range(self.num_slots) if slot not in self.rows]

    def placeable(self, length, slot):
        if slot is None:
            return 0 <= length <= CAPACITY and bool(self.free_slots())
        return 0 <= length <= CAPACITY and slot in self.free_slots()

    def place(self, slot, tokens, wanted):
        assert slot == (self.free_slots()[0] if wanted is None else wanted)
        self.rows[slot] = tokens
        self.width = max(self.width, len(tokens))

    def refused(self, call, *arguments):
        """The call raises, and not one bit has changed."""
        EVENTS["refused calls of a cache"] += 1
        cache = self.cache
        tensors, committed = self.tensors(cache), cache.bytes_committed
        before = [storage(x).view(torch.int16).clone() for x in tensors]
        shape = cache.shape.copy()
        with pytest.raises(ValueError, match="must be .*, got "):
            call(*arguments)
        assert all(now is then for now, then in zip(self.tensors(cache), tensors, strict=True))
        assert cache.shape == shape
        assert cache.bytes_committed == committed
        for tensor, bits in zip(tensors, before, strict=True):
            assert torch.equal(storage(tensor).view(torch.int16), bits)

    # Operations of a relay

    @rule(length=ANY_LENGTH, slot=WANTED_SLOT)
    def insert(self, length, slot):
        self.insert_tokens(length, slot)

    def insert_tokens(self, length, slot):
        if not self.placeable(length, slot):
            self.refused(self.cache.insert, *self.vectors(range(length)), slot)
            return
        tokens = self.new_tokens(length)
        self.place(self.cache.insert(*self.vectors(tokens), slot), tokens, slot)

    @rule(length=st.integers(-1, CAPACITY + 1), slot=WANTED_SLOT)
    def allocate_and_prefill(self, length, slot):
        if not self.placeable(length, slot):
            self.refused(self.cache.allocate, length, slot)
            return
        tokens = self.new_tokens(length)
        taken = self.cache.allocate(length, slot)
        self.place(taken, tokens, slot)
        self.write(taken, tokens)

    def extendable(self, counts):
        if not self.aligned:
            return all(len(self.rows[slot]) + n <= CAPACITY for slot, n in counts.items())
        if any(row and slot not in counts for slot, row in self.rows.items()):
            return False
        count = max(counts.values(), default=0)
        return len(set(counts.values())) < 2 and self.width - self.padding() + count <= CAPACITY

    def widen(self, count):
        """Sets the model's width for rows that are about to get `count` tokens each: columns that
        are padding in every row are dropped if the new ones need their room."""
        if self.aligned and self.rows:
            if self.width + count > CAPACITY:
                self.width -= self.padding()
            self.width += count

    def extend(self, counts, given):
        """Extends cache and model; False if that had to be rejected."""
        if not self.extendable(counts):
            self.refused(self.cache.extend, list(counts), given)
            return False
        self.cache.extend(list(counts), given)
        self.widen(max(counts.values(), default=0))
        for slot, count in counts.items():
            self.rows[slot] += self.new_tokens(count)
        return True

    @rule(data=st.data(), everyone=st.integers(0, 9))
    def append(self, data, everyone):
        """One decode step: a token per row, through append_kv layer by layer."""
        slots = [slot for slot in self.rows if everyone or data.draw(st.booleans())]
        if not self.extend(dict.fromkeys(slots, 1), None) or not slots:
            return
        key, value = self.vectors([self.rows[slot][-1] for slot in slots])
        columns = int32([self.cache.shape.end(slot) - 1 for slot in slots])
        for layer in range(LAYERS):
            caches, scales = self.cache.layer(layer), self.cache.scales(layer)
            self.ops.append_kv(key[layer], value[layer], *caches, int32(slots), columns, **scales)

    @rule(data=st.data(), count=st.integers(0, 4), equal=st.booleans(), everyone=st.booleans())
    def extend_by_chunks(self, data, count, equal, everyone):
        counts = {
            slot: count if equal else data.draw(st.integers(0, 4))
            for slot in self.rows
            if everyone or data.draw(st.booleans())
        }
        if self.extend(counts, list(counts.values())):
            for slot, n in counts.items():
                self.write(slot, self.rows[slot][len(self.rows[slot]) - n :])

    def some_row(self, data):
        """A slot, most often one in use."""
        return data.draw(st.sampled_from(3 * list(self.rows) + list(range(-1, MAX_SLOTS))))

    @rule(data=st.data())
    def leave(self, data):
        self.free(self.some_row(data))

    def free(self, slot):
        if slot not in self.rows:
            self.refused(self.cache.free, slot)
            return
        self.cache.free(slot)
        del self.rows[slot]
        self.width = self.width if self.rows else 0

    @rule(data=st.data())
    def preempt(self, data):
        slot = self.some_row(data)
        if slot not in self.rows:
            self.refused(self.cache.extract, slot)
            return
        self.parked.append((self.rows[slot], *self.cache.extract(slot)))
        self.free(slot)

    @rule(data=st.data(), slot=WANTED_SLOT)
    def resume(self, data, slot):
        if not self.parked:
            return
        index = data.draw(st.integers(0, len(self.parked) - 1))
        tokens, key, value = self.parked[index]
        if not self.placeable(len(tokens), slot):
            self.refused(self.cache.insert, key, value, slot)
            return
        del self.parked[index]
        self.place(self.cache.insert(key, value, slot), tokens, slot)

    @rule(data=st.data())
    def relocate(self, data):
        """Moves a row to another slot through move_kv: make room there, move, leave the old
        slot."""
        if not self.rows or not self.free_slots():
            return
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        tokens = self.rows[slot]
        target = self.cache.allocate(len(tokens))
        shape = self.cache.shape
        places = (slot, shape.start(slot), target, shape.start(target), len(tokens))
        index = [int32([place]) for place in places]
        self.ops.move_kv(self.cache.keys, self.cache.values, *index, **self.cache.scales())
        self.place(target, tokens, None)
        self.free(slot)

    @rule(data=st.data(), wanted=WANTED_SLOT, whole=st.booleans())
    def copy_row(self, data, wanted, whole):
        slot = self.some_row(data)
        row = self.rows.get(slot, [])
        length = None if whole else data.draw(st.integers(0, len(row)))
        tokens = row if whole else row[:length]
        # A row moves into a free slot whole, to where all rows end.
        if slot not in self.rows or not self.placeable(len(row), wanted):
            self.refused(lambda: self.cache.copy_row(slot, wanted, length=length))
            return
        self.place(self.cache.copy_row(slot, wanted, length=length), list(tokens), wanted)

    @rule(through_pickle=st.booleans())
    def replace_by_a_copy(self, through_pickle):
        """A copy has the same rows, also after the original has changed."""
        old = self.cache
        self.cache = pickle.loads(pickle.dumps(old)) if through_pickle else copy.deepcopy(old)
        assert self.cache.shape == old.shape
        self.poison(old, torch.ones(old.shape.num_slots, CAPACITY, dtype=torch.bool))

    @rule(data=st.data(), paged=st.booleans())
    def attend(self, data, paged):
        """The last tokens of some rows, in any order, get the bits that they get in a separate
        cache.

        When paged, each slot is a page named by a block table, among entries that name no page.
        """
        slots = data.draw(st.permutations([slot for slot, row in self.rows.items() if row]))
        slots = slots[: data.draw(st.integers(0, len(slots)))]
        if not slots:
            return
        shape = self.cache.shape
        counts = [data.draw(st.integers(1, shape.length(slot))) for slot in slots]
        query = torch.cat(
            [self.vectors(self.rows[s][-n:])[0][0] for s, n in zip(slots, counts, strict=True)]
        ).repeat_interleave(2, 1)
        index = [int32(list(map(of, slots))) for of in (int, shape.start, shape.length)]
        table = {}
        if paged and self.ops is baton_kernels:
            anything = torch.full((len(slots), 2), -(2**31), dtype=torch.int32)
            anything[:, 0] = index[0]
            index[0], table = None, {"block_table": anything}
        out, lse = self.ops.ragged_attention(
            query, *self.cache.layer(LAYERS - 1), cumulative(counts), *index, return_lse=True,
            **table, **self.cache.scales(LAYERS - 1),
        )  # fmt: skip
        place = slots.index(data.draw(st.sampled_from(slots)))
        mine = slice(sum(counts[:place]), sum(counts[: place + 1]))
        alone = self.ops.ragged_attention(
            query[mine], cu_seqlens_q=cumulative([counts[place]]), slots=int32([0]),
            starts=int32([0]), lengths=index[2][place, None], return_lse=True,
            **self.alone(self.rows[slots[place]]),
        )  # fmt: skip
        for got, want in zip((out, lse), alone, strict=True):
            assert not want.isnan().any()
            assert_same_bits(got[mine], want, f"slot {slots[place]} in a batch")

    @rule()
    def trim(self):
        self.drop_common_padding()

    def drop_common_padding(self):
        self.cache.trim()
        self.width -= self.padding()

    @rule(num_slots=st.integers(0, MAX_SLOTS))
    def resize(self, num_slots):
        if num_slots < max(self.rows, default=0) + 1:
            self.refused(self.cache.resize, num_slots)
            return
        self.cache.resize(num_slots)
        self.num_slots = num_slots

    @rule()
    def release(self):
        self.cache.release()

    # Calls that must be refused

    @rule(data=st.data(), bad=ANY_SLOT)
    def extend_a_wrong_row(self, data, bad):
        slots = data.draw(st.permutations(sorted(self.rows))) + [bad]
        self.refused(self.cache.extend, slots, [0] * len(slots))

    @rule(length=st.integers(0, CAPACITY), op=st.sampled_from(["insert_kv", "move_kv"]))
    def insert_while_an_op_fails(self, length, op):
        self.while_an_op_fails(op, lambda: self.insert_tokens(length, None))

    @rule(what=st.sampled_from(["append", "trim"]))
    def move_while_the_op_fails(self, what):
        counts = dict.fromkeys(self.rows, 1)
        if what == "append" and not self.extendable(counts):
            return
        call = (
            self.drop_common_padding if what == "trim" else lambda: self.cache.extend(list(counts))
        )
        failed = self.while_an_op_fails("move_kv", call)
        if what == "append" and not failed:
            # Nothing had to move: finish the step in the model as well.
            self.widen(1)
            for slot in counts:
                self.rows[slot] += self.new_tokens(1)
                self.write(slot, self.rows[slot][-1:])

    def while_an_op_fails(self, op, call):
        """True if the op was called; then neither the rows nor the model have changed."""
        shape = self.cache.shape.copy()

        def broken(*_, **__):
            INJECTED["op of the cache"] += 1
            raise BrokenOpError

        whole = getattr(kv_cache, op)
        setattr(kv_cache, op, broken)
        try:
            call()
        except BrokenOpError:
            assert self.cache.shape == shape
            return True
        finally:
            setattr(kv_cache, op, whole)
        return False

    # Invariants

    @invariant()
    def shape_is_the_models(self):
        shape = self.cache.shape
        assert (shape.num_slots, shape.capacity, shape.aligned) == (
            self.num_slots,
            CAPACITY,
            self.aligned,
        )
        assert shape.used == tuple(sorted(self.rows))
        assert shape.num_free == len(self.free_slots())
        longest = max(map(len, self.rows.values()), default=0)
        assert shape.width == (self.width if self.aligned else longest)
        for slot, row in self.rows.items():
            assert shape.length(slot) == len(row)
            assert shape.start(slot) == (self.width - len(row) if self.aligned else 0)
        tokens = sum(map(len, self.rows.values()))
        assert self.cache.bytes_in_use == tokens * self.cache.bytes_per_token

    @invariant()
    def rows_hold_their_tokens_and_padding_is_poisoned(self):
        cache, shape = self.cache, self.cache.shape
        padding = torch.ones(self.num_slots, CAPACITY, dtype=torch.bool)
        for slot, row in self.rows.items():
            for got, expected in zip(cache.extract(slot), self.held(row), strict=True):
                assert_same_bits(got, expected, f"slot {slot}")
            padding[slot, shape.start(slot) : shape.end(slot)] = False
        self.poison(cache, padding)
