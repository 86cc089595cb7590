"""Facts of the slot table that its state machine does not ask for: sizes, layouts, states, refusals."""

import copy

import numpy
import pytest
import torch

from kvpress import memory
from kvpress.row_format import row_format
from kvpress.slots import POSITION, SlotTable

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 4, 8


def at(position: int) -> torch.Tensor:
    """The position of one token of every row."""
    return torch.tensor([[position]], dtype=torch.int32)


def rows(tokens, start=0, dtype=torch.float32):
    """Keys and values in which every number is another."""
    serial = torch.arange(start, start + BATCH * HEADS * tokens, dtype=dtype).view(BATCH, HEADS, tokens, 1)
    return serial + torch.arange(KEY_DIM) / 8, -serial - torch.arange(VALUE_DIM) / 8


def filled_table(tokens=10, column="score", pads=(0, 0), form=None):
    table = SlotTable((column,)) if form is None else SlotTable((column,), row_format(form))
    new = table.append(*rows(tokens))
    positions = torch.stack([torch.arange(tokens, dtype=torch.int32) - pad for pad in pads])
    table.place(new, positions.clamp(min=-1), tuple(tokens - pad for pad in pads))
    table.settle()
    return table


def steady_table(kept=4):
    table = filled_table()
    index = torch.arange(10 - kept, 10).expand(BATCH, HEADS, kept).contiguous()
    table.keep(index, numpy.full((BATCH, HEADS), kept), 1)
    return table


def ragged_table():
    table = filled_table()
    counts = numpy.array([[1, 2, 3], [4, 2, 2]])
    index = torch.arange(6, 10).expand(BATCH, HEADS, 4).contiguous()
    table.keep_ragged(index, counts, counts + 1)
    return table


def test_an_empty_table():
    table = SlotTable(("score",))
    assert table.is_empty and table.kept_positions().shape == (0, 0, 0) and table.kept_positions().dtype == torch.long
    assert table.kv_bytes_per_token == table.full_bytes_per_token == 0 and table.nbytes == 0
    assert table.state()["dims"] == (0, 0) and table.state()["held"].shape == (0, 0)
    table.select_batch(torch.tensor([0, 0]))
    assert table.is_empty and not table.packed and not table.has_layout
    with pytest.raises(RuntimeError, match="cannot take back 1 tokens, the cache holds 0"):
        table.drop_last(1)
    table.settle()
    assert table.is_empty and table.owned  # nothing was to be copied


def test_bytes():
    table = filled_table()
    assert table.kv_bytes_per_token == table.full_bytes_per_token == BATCH * HEADS * (KEY_DIM + VALUE_DIM) * 4
    assert table.bytes_per_token == BATCH * HEADS * ((KEY_DIM + VALUE_DIM) * 4 + 4 + 4)
    assert table.fixed_bytes == 4 * BATCH * HEADS * 8
    assert table.slot_bytes == table.bytes_per_token - BATCH * (HEADS - 1) * 4  # positions are stored once
    assert table.nbytes == table.slot_bytes * table.capacity
    apart = steady_table()
    assert apart.slot_bytes == apart.bytes_per_token == table.bytes_per_token
    ragged = ragged_table()
    slots = 14 + BATCH * HEADS
    small = BATCH * HEADS * 5 * (4 + 4 + 1) + 3 * BATCH * HEADS * 8  # columns and `outside`; spare, starts, lengths
    assert ragged.nbytes == slots * (KEY_DIM + VALUE_DIM) * 4 + small


def test_the_models_tensors_serve_until_the_end_of_the_forward():
    table, (keys, values) = SlotTable(("score",)), rows(5)
    assert table.append(keys, values) == slice(0, 5)
    assert table.keys is keys and table.values is values and not table.owned
    assert (table.positions == -1).all() and (table.policy_columns["score"] == 0).all()  # until they are placed
    table.write_keys(slice(0, 5), keys + 1)
    assert torch.equal(table.keys, keys + 1) and torch.equal(keys, rows(5)[0])
    table.settle()
    assert table.owned and table.keys is not keys and torch.equal(table.dense()[1], values)
    assert table.keys.shape[2] == table.capacity == 5 + 4
    assert not table.keys[:, :, 5:].any() and not table.values[:, :, 5:].any()
    table.values[:, :, 0] = 7
    assert torch.equal(values, rows(5)[1])
    buffer = table.keys
    table.settle()
    assert table.keys is buffer


def test_room_to_grow():
    table = filled_table(10)
    assert table.capacity == 15 and table.capacity_for(15) == 15 and table.capacity_for(16) == 24
    assert table.append(*rows(5)) == slice(10, 15)
    assert table.capacity == table.positions.shape[2] == table.columns["score"].shape[2] == 15
    table.append(*rows(1))
    assert table.capacity == 24 and table.columns["score"].shape[2] == table.columns[POSITION].shape[2] == 24
    assert not table.columns["score"].any() and not table.keys[:, :, 16:].any()
    few, big = SlotTable(), SlotTable()
    few.append(*rows(511))
    assert few.capacity_for(60) == 60 + 30 and few.capacity_for(511) == 511 + 32
    few.stowage = Below(None, None)
    assert few.capacity_for(60) == 60 + 4  # every byte is accounted for
    big.append(*rows(1280))
    assert big.capacity_for(512) == 512 + 8 and big.capacity_for(1280) == 1300 and big.capacity_for(1344) == 1365
    table = filled_table(10)
    table.limit = 17
    table.append(*rows(6))
    assert table.capacity == 17
    table.append(*rows(1))
    assert table.capacity == 17
    table.append(*rows(1))  # beyond what was known: as without
    assert table.capacity == 18 + 9
    table = filled_table(10)
    table.limit = 16
    table.append(*rows(6))
    assert table.capacity == 16


@pytest.mark.parametrize("tokens", [HEADS, KEY_DIM, VALUE_DIM])
def test_room_is_not_read_whatever_the_sizes_are(tokens):
    table = filled_table(tokens)
    keys, values = table.dense()
    assert table.keys.shape[2] == tokens + 4
    assert torch.equal(keys, rows(tokens)[0]) and torch.equal(values, rows(tokens)[1])


def test_new_tokens_start_without_a_score():
    table = filled_table(10)
    for column in table.columns.values():
        column.fill_(9)
    new = table.append(*rows(2))
    assert (table.policy_columns["score"][:, :, new] == 0).all() and (
        table.policy_columns["score"][:, :, :10] == 9
    ).all()
    steady = steady_table()
    steady.columns["score"].fill_(9)
    slot = steady.append(*rows(1, start=500))
    assert slot is steady.spare and slot.tolist() == [[[4]] * HEADS] * BATCH
    assert (steady.policy_columns["score"] == torch.tensor([9.0] * 4 + [0.0])).all()
    assert torch.equal(steady.keys[:, :, 4:], rows(1, start=500)[0])


def test_positions_of_one_token_and_of_many():
    table = filled_table(4)
    new = table.append(*rows(1))
    table.place(new, at(4), (1, 1))
    assert (table.positions[:, :, 4] == 4).all() and (table.held == 5).all()
    steady = steady_table()
    steady.place(steady.append(*rows(1)), at(10), (1, 1))
    assert (steady.positions[:, :, 4] == 10).all() and (steady.held == 5).all()
    other = steady_table()
    other.place(other.append(*rows(1)), torch.tensor([[10], [-1]], dtype=torch.int32), (1, 0))
    assert other.positions[:, :, 4].tolist() == [[10] * HEADS, [-1] * HEADS] and other.held.tolist() == [
        [5] * HEADS,
        [4] * HEADS,
    ]
    assert other.has_empty


def test_empty_slots_are_noticed():
    full = filled_table(4)
    assert not full.has_empty
    full.place(full.append(*rows(1)), at(4), (1, 1))
    assert not full.has_empty
    full.place(full.append(*rows(1)), torch.tensor([[5], [-1]], dtype=torch.int32), (1, 0))
    assert full.has_empty
    assert filled_table(4, pads=(2, 0)).has_empty
    many = filled_table(4)
    assert not many.has_empty
    many.place(many.append(*rows(3)), torch.tensor([[4, 5, 6], [-1, 4, 5]], dtype=torch.int32), (3, 2))
    assert many.has_empty
    steady = steady_table()
    assert steady.has_empty  # the spare one, before a token comes
    steady.place(steady.append(*rows(1)), at(10), (1, 1))
    assert not steady.has_empty
    ragged = ragged_table()
    ragged.place(ragged.append(*rows(1)), at(10), (1, 1))
    assert not ragged.has_empty and ragged.has_layout


def test_a_retired_token_leaves_its_slot():
    table = steady_table()
    table.place(table.append(*rows(1)), at(10), (1, 1))
    assert not table.has_empty
    slot = torch.tensor([[[0], [1], [2]], [[3], [4], [0]]])
    table.retire(slot)
    assert table.spare is slot and (table.held == 4).all()
    assert table.kept_positions().tolist() == [
        [[7, 8, 9, 10], [6, 8, 9, 10], [6, 7, 9, 10]],
        [[6, 7, 8, 10], [6, 7, 8, 9], [7, 8, 9, 10]],
    ]
    short = steady_table()
    short.place(short.append(*rows(1)), torch.tensor([[10], [-1]], dtype=torch.int32), (1, 0))
    short.retire(torch.full((BATCH, HEADS, 1), 0))
    assert short.held.tolist() == [[4] * HEADS] * 2  # the second row had no more than that
    ragged = ragged_table()
    ragged.place(ragged.append(*rows(1)), torch.tensor([[10], [-1]], dtype=torch.int32), (1, 0))
    ragged.retire(torch.zeros(BATCH, HEADS, 1, dtype=torch.long))
    assert ragged.held.tolist() == [[1, 2, 3], [4, 2, 2]]


def test_heads_that_keep_fewer_have_empty_slots():
    table = filled_table()
    table.columns["score"].fill_(3)
    counts = numpy.array([[1, 2, 3], [3, 3, 2]])
    table.keep(torch.tensor([7, 8, 9]).expand(BATCH, HEADS, 3).contiguous(), counts, 2)
    assert table.spare is None and table.count == 3 and table.has_empty and table.capacity == 5
    assert table.positions.tolist() == [[[-1, -1, 9], [-1, 8, 9], [7, 8, 9]], [[7, 8, 9], [7, 8, 9], [-1, 8, 9]]]
    assert (
        table.policy_columns["score"][0, 0].tolist() == [0, 0, 3] and (table.policy_columns["score"][1, 1] == 3).all()
    )


def test_positions_of_heads_that_keep_fewer_end_with_minus_one():
    table = filled_table()
    counts = numpy.array([[1, 2, 3], [3, 3, 2]])
    table.keep(torch.tensor([7, 8, 9]).expand(BATCH, HEADS, 3).contiguous(), counts, 1)
    assert table.kept_positions().tolist() == [
        [[9, -1, -1], [8, 9, -1], [7, 8, 9]],
        [[7, 8, 9], [7, 8, 9], [8, 9, -1]],
    ]
    empty = filled_table(2)
    empty.drop_last(2)
    assert empty.kept_positions().shape == (BATCH, HEADS, 0)
    assert filled_table(2, pads=(2, 2)).kept_positions().shape == (BATCH, HEADS, 0)  # padding alone


def test_vacated_slots_are_empty():
    table = steady_table()
    table.place(table.append(*rows(1)), at(10), (1, 1))
    assert not table.has_empty
    stays = torch.tensor([True, False, True, True, True]).expand(BATCH, HEADS, 5)
    table.vacate(stays, numpy.full((BATCH, HEADS), 4))
    assert table.has_empty and (table.held == 4).all() and table.spare.tolist() == [[[1]] * HEADS] * BATCH
    assert table.kept_positions().tolist() == [[[6, 8, 9, 10]] * HEADS] * BATCH
    assert table.held.dtype == numpy.int64
    several = steady_table()
    several.place(several.append(*rows(1)), at(10), (1, 1))
    stays = torch.tensor([True, False, True, False, True]).expand(BATCH, HEADS, 5)
    several.vacate(stays, numpy.full((BATCH, HEADS), 3))
    assert several.columns[POSITION].tolist() == [[[6, -1, 8, -1, 10]] * HEADS] * BATCH
    assert several.kept_positions().tolist() == [[[6, 8, 10]] * HEADS] * BATCH


def test_the_empty_slot_of_a_ragged_head_is_its_own():
    table = ragged_table()
    assert table.empty_slot().squeeze(-1).tolist() == [[1, 2, 3], [4, 2, 2]]
    assert torch.equal(table.spare, table.empty_slot())
    keys, values, layout = table.readable()
    assert keys.shape == (20, KEY_DIM) and values.shape == (20, VALUE_DIM)
    assert layout["lengths"].tolist() == [[2, 3, 4], [5, 3, 3]] and layout["starts"].tolist() == [
        [0, 2, 5],
        [9, 14, 17],
    ]
    assert set(layout) == {"starts", "lengths"}


@pytest.mark.parametrize("form", [None, "bfloat16", "int8"])
def test_tokens_appended_one_by_one_are_those_appended_together(form):
    single, together = filled_table(6, form=form), filled_table(6, form=form)
    keys, values = rows(20, start=100)
    first = single.prepared
    assert first is not None
    for token in range(20):
        new = single.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        assert new == slice(6 + token, 7 + token)
        single.place(new, at(6 + token), (1, 1))
        if token == 7:  # taken back, and another in its place
            single.policy_columns["score"].fill_(3.0)
            single.drop_last(1)
            single.place(single.append(keys[:, :, 7:8], values[:, :, 7:8]), at(13), (1, 1))
            assert (single.policy_columns["score"][..., -1] == 0).all()
            single.policy_columns["score"].zero_()
        if token == 12:
            other = copy.deepcopy(single)
            other.place(other.append(keys[:, :, :1], values[:, :, :1]), at(19), (1, 1))
            assert other.prepared is not single.prepared
            assert not torch.equal(other.stored()[0][:, :, -1], single.stored()[0][:, :, -1])
    assert single.prepared is not first, "buffers grew"
    together.place(together.append(keys, values), torch.arange(6, 26, dtype=torch.int32)[None], (20, 20))
    for own, expected in zip(single.stored(), together.stored(), strict=True):
        assert torch.equal(own, expected)
    assert torch.equal(single.positions, together.positions) and (single.held == together.held).all()
    assert torch.equal(single.policy_columns["score"], together.policy_columns["score"])


def test_a_token_of_another_type_is_converted():
    table = filled_table(6)
    keys, values = rows(1, start=100, dtype=torch.float64)
    table.place(table.append(keys, values), at(6), (1, 1))
    stored_keys, stored_values = table.stored()
    assert stored_keys.dtype == torch.float32
    assert torch.equal(stored_keys[:, :, 6:], keys.float()) and torch.equal(stored_values[:, :, 6:], values.float())


def test_rows_of_a_steady_table_change_places():
    table = steady_table()
    table.spare = torch.arange(BATCH * HEADS).view(BATCH, HEADS, 1) % 5
    expected = table.spare.flip(0)
    assert not torch.equal(table.spare, expected)
    table.select_batch(torch.tensor([1, 0]))
    assert torch.equal(table.spare, expected)
    table.select_batch(torch.tensor([0, 0, 1]))
    assert table.spare.shape == (3, HEADS, 1)


def test_large_buffers_ask_for_large_pages(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "prefer_large_pages", lambda tensor: asked.append(tensor.nbytes))
    like = torch.empty(0)
    memory.allocate((memory.LARGE // 4 - 1,), like)
    assert asked == []
    memory.allocate((memory.LARGE // 4,), like)
    memory.filled((memory.LARGE // 4, 3), 0, like, torch.int32)
    assert asked == [memory.LARGE, 3 * memory.LARGE]
    monkeypatch.undo()
    buffer = memory.allocate((3, memory.LARGE // 4), like).fill_(2.0)
    assert buffer.sum() == 2 * 3 * (memory.LARGE // 4)


def test_taking_back():
    table = filled_table(6)
    table.drop_last(0)
    assert table.count == 6
    table.drop_last(6)
    assert table.count == 0 and (table.held == 0).all()
    with pytest.raises(RuntimeError, match="cannot take back 1 tokens, the cache holds 0"):
        table.drop_last(1)
    padded = filled_table(6, pads=(5, 0))
    padded.drop_last(2)
    assert padded.held.tolist() == [[0] * HEADS, [4] * HEADS]
    steady = steady_table()
    steady.place(steady.append(*rows(1)), at(10), (1, 1))
    with pytest.raises(RuntimeError, match="cannot take back 2 tokens from a cache that has evicted since"):
        steady.drop_last(2)
    steady.drop_last(0)
    assert (steady.held == 5).all()
    steady.drop_last(1)
    assert (steady.held == 4).all()


def test_keys_are_exchanged_in_place():
    table = filled_table(6)
    new = table.append(*rows(2))
    table.write_keys(new, torch.full((BATCH, HEADS, 2, KEY_DIM), 5.0))
    assert (table.dense()[0][:, :, 6:] == 5).all() and torch.equal(table.dense()[0][:, :, :6], rows(6)[0])
    steady = steady_table()
    slot = steady.append(*rows(1))
    steady.write_keys(slot, torch.full((BATCH, HEADS, 1, KEY_DIM), 5.0))
    assert (steady.keys[:, :, 4] == 5).all() and not (steady.keys[:, :, :4] == 5).all()


def test_where_a_new_key_lies():
    table = filled_table(6)
    assert table.place_of_key(slice(5, 6)) == (None, 0)  # nothing is prepared: buffers may change
    new = table.append(*rows(1, start=70))
    table.place(new, at(6), (1, 1))
    assert table.place_of_key(new) == (table.keys, 6) and torch.equal(table.keys[:, :, 6:7], rows(1, start=70)[0])
    assert table.place_of_key(slice(5, 7)) == table.place_of_key(torch.zeros(BATCH, HEADS, 1)) == (None, 0)
    packed = filled_table(6, form="int8")
    assert packed.place_of_key(packed.append(*rows(1))) == (None, 0) and packed.prepared is not None


def test_growing_again_from_a_steady_table():
    table = steady_table()
    table.columns["score"].copy_(table.positions)
    for position in (10, 11):
        table.place(table.append(*rows(1, start=position * 100)), at(position), (1, 1))
        table.columns["score"].scatter_(-1, table.spare, float(position))
        table.retire(table.positions.argmin(-1, keepdim=True))
    new = table.append(*rows(3))
    assert new == slice(4, 7) and table.spare is None and table.count == 7
    table.place(new, torch.tensor([[12, 13, 14]], dtype=torch.int32), (3, 3))
    assert table.positions.tolist() == [[[8, 9, 10, 11, 12, 13, 14]] * HEADS] * BATCH
    assert table.policy_columns["score"].tolist() == [[[8, 9, 10, 11, 0, 0, 0]] * HEADS] * BATCH
    assert torch.equal(table.dense()[0][:, :, 2:3], rows(1, start=1000)[0]) and not table.has_empty


def test_growing_again_where_heads_hold_fewer():
    table = filled_table()
    table.keep(torch.tensor([7, 8, 9]).expand(BATCH, HEADS, 3).contiguous(), numpy.array([[1, 2, 3], [3, 3, 2]]), 1)
    table.place(table.append(*rows(1, start=1000)), at(10), (1, 1))
    table.retire(torch.tensor([[[1], [0], [3]], [[3], [3], [0]]]))  # an empty slot, or the newest token's
    new = table.append(*rows(2))
    table.place(new, torch.tensor([[11, 12]], dtype=torch.int32), (2, 2))
    assert new == slice(3, 5) and table.has_empty
    assert table.positions.tolist() == [
        [[-1, 9, 10, 11, 12], [8, 9, 10, 11, 12], [7, 8, 9, 11, 12]],
        [[7, 8, 9, 11, 12], [7, 8, 9, 11, 12], [8, 9, 10, 11, 12]],
    ]
    assert table.held.tolist() == [[4, 5, 5], [5, 5, 5]]


def test_empty_slots_of_ragged_heads_have_no_score():
    table = filled_table()
    table.columns["score"].fill_(3)
    counts = numpy.array([[1, 2, 3], [4, 2, 2]])
    table.keep_ragged(torch.arange(6, 10).expand(BATCH, HEADS, 4).contiguous(), counts, counts + 1)
    for row in range(BATCH):
        for head in range(HEADS):
            held = int(counts[row, head])
            assert table.policy_columns["score"][row, head].tolist() == [3] * held + [0] * (5 - held)


def test_state_there_and_back():
    for table in (filled_table(pads=(3, 0)), steady_table(), ragged_table()):
        made = SlotTable(("score",))
        made.load_state(table.state())
        assert torch.equal(made.kept_positions(), table.kept_positions())
        assert all(torch.equal(a, b) for a, b in zip(made.dense(), table.dense(), strict=True))
        assert made.owned and made.count == table.count and made.held.tolist() == table.held.tolist()
        assert made.has_layout == table.has_layout and made.has_empty == table.has_empty
        assert (made.spare is None) == (table.spare is None)
    with pytest.raises(ValueError, match=r"columns must be \['other', 'position'\], got \['position', 'score'\]"):
        SlotTable(("other",)).load_state(filled_table().state())


@pytest.mark.parametrize(("form", "bytes_of_a_row"), [("bfloat16", 2 * KEY_DIM + 2 * VALUE_DIM), ("int8", None)])
def test_packed_rows(form, bytes_of_a_row):
    table = filled_table(form=form)
    assert table.packed and table.has_layout and table.dense()[0].dtype == torch.float32
    assert (table.dense()[0] - rows(10)[0]).abs().max() < 0.5 and (table.dense()[1] - rows(10)[1]).abs().max() < 0.5
    assert table.full_bytes_per_token == BATCH * HEADS * (KEY_DIM + VALUE_DIM) * 4
    assert table.kv_bytes_per_token < table.full_bytes_per_token
    if bytes_of_a_row is not None:
        assert table.kv_bytes_per_token == BATCH * HEADS * bytes_of_a_row
    assert ("keys_scale" in table.readable()[2]) == ("values_scale" in table.readable()[2]) == (form == "int8")
    views = table.views()
    assert views[0].shape == table.dense()[0].shape
    first = SlotTable((), row_format(form))
    first.append(*rows(3))
    assert not first.packed and torch.equal(first.views()[0], rows(3)[0])  # still the model's own


class Below:
    """A stowage that holds the first slots elsewhere, and counts what it is asked."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values
        self.asked = []
        self.gatherings = 0

    def fetch(self, table, tokens):
        self.asked.append(("fetch", tokens, table.capacity))

    def gathered(self, table):
        self.gatherings += 1
        own = table.count - table.base
        return torch.cat([self.keys, table.keys[:, :, :own]], dim=2), torch.cat(
            [self.values, table.values[:, :, :own]], dim=2
        )

    def cut(self, table):
        self.asked.append(("cut", table.count))

    def select_batch(self, table, rows):
        self.asked.append(("select_batch", rows))


def test_a_table_whose_first_slots_lie_elsewhere():
    table = filled_table(10)
    keys, values = rows(10)
    below = table.stowage = Below(keys[:, :, :6], values[:, :, :6])
    table.lie(keys[:, :, 6:].clone(), values[:, :, 6:].clone(), 6)
    assert table.capacity == 10 and table.owned
    new = table.append(*rows(2, start=700))
    table.place(new, torch.tensor([[10, 11]], dtype=torch.int32), (2, 2))
    assert new == slice(10, 12) and table.capacity == 16 and table.keys.shape[2] == table.values.shape[2] == 10
    assert below.asked == [("fetch", 2, 10)]  # once, and before there is more room: it accounts for that first
    assert torch.equal(table.dense()[0], torch.cat([keys, rows(2, start=700)[0]], dim=2))
    assert torch.equal(table.dense()[1], torch.cat([values, rows(2, start=700)[1]], dim=2))
    table.write_keys(new, torch.full((BATCH, HEADS, 2, KEY_DIM), 5.0))
    assert (table.dense()[0][:, :, 10:] == 5).all() and torch.equal(table.dense()[0][:, :, :10], keys)
    state = table.state()
    assert torch.equal(state["keys"], table.dense()[0]) and state["count"] == 12
    table.drop_last(6)
    assert below.asked[-1] == ("cut", 6)
    table.drop_last(1)
    assert below.asked[-1] == ("cut", 5)
    table.select_batch(torch.tensor([1, 1]))
    assert below.asked[-1] == ("select_batch", [1, 1])
    fresh = SlotTable(("score",))
    fresh.stowage = Below(keys, values)
    fresh.append(keys, values)
    assert fresh.dense()[0] is keys and fresh.stowage.gatherings == 0  # all of it lies here
    fresh.settle()
    assert not fresh.owned and fresh.keys is keys  # the stowage copies
    fresh.take_over()
    assert fresh.owned and fresh.keys.shape[2] == fresh.capacity_for(10)
