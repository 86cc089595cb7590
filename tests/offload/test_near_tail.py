"""The last slots of a table lie among its near copies, are accounted for once, and stay right whatever happens to the cache."""

import copy

import pytest
import torch

from kvpress import PolicyCache
from kvpress.memory import held_bytes
from kvpress.offload import Offload, hot_slots
from kvpress.offload.hot_slots import HotSlots
from kvpress.offload.stored_slots import StoredSlots
from kvpress.policies import Quest, TokenSelect
from kvpress.row_format import RowFormat
from kvpress.testing.families import random_tokens, tiny_model

POLICIES = {
    "tokenselect": TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.5, index="int8"),
    "quest": Quest(top_k=8, page_size=4, skip_layers=0),
}
BLOCK, PROMPT = 16, 36


@pytest.fixture(autouse=True)
def few_rows_ahead(monkeypatch):
    monkeypatch.setattr(hot_slots, "AHEAD", 3)


def decode(model, cache, tokens):
    with torch.no_grad():
        return torch.cat([model(token.view(-1, 1), past_key_values=cache).logits for token in tokens.T], dim=1)


def turn(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


def program(model, cache, ids, branches):
    """Logits of everything that may happen to a tail; blocks of 16 slots are filled on the way."""
    found = [turn(model, cache, ids[:, :PROMPT]), decode(model, cache, ids[:, PROMPT:55])]
    yield cache
    cache.crop(-3)  # within the tail
    found.append(decode(model, cache, ids[:, 60:64]))
    cache.crop(-8)  # into the block before it
    found += [
        decode(model, cache, ids[:, 64:70]),
        turn(model, cache, ids[:, 70:75]),
        decode(model, cache, ids[:, 75:80]),
    ]
    cache.batch_repeat_interleave(2)
    found.append(decode(model, cache, torch.cat([ids[:, 80:90], ids[:, 81:91]])))
    cache.reorder_cache(torch.tensor([1, 0]))
    found.append(decode(model, cache, torch.cat([ids[:, 91:96], ids[:, 92:97]])))
    other = copy.deepcopy(cache)
    branches.append(other)
    found += [decode(model, each, part) for each in (cache, other) for part in (ids[:, 97:101].repeat(2, 1),)]
    found += [turn(model, other, ids[:, 101:120].repeat(2, 1)), decode(model, other, ids[:, 120:124].repeat(2, 1))]
    yield torch.cat([each.flatten() for each in found])


def logits_of(policy, offload, check=lambda cache: None):
    model, ids, branches = tiny_model("llama", num_hidden_layers=3), random_tokens(1, 124), []
    cache = PolicyCache(model, policy, offload=offload)
    steps = program(model, cache, ids, branches)
    check(next(steps))
    found = next(steps)
    for each in (*branches, cache):
        each.close()
    return found


def check_tail(cache):
    taken = 0
    for layer in cache.policy_layers:
        table, stowage = layer.table, layer.stowage
        hot = stowage.copies.slots
        if hot is None or not table.base:
            continue
        assert hot.is_tail(table.keys) and table.keys.data_ptr() == hot.tensors["key"].data_ptr()
        of_step = [] if layer.step is None else layer.step.tensors()
        held = held_bytes([*table.tensors(), *layer.reader.tensors(), *of_step, *hot.held()])
        assert stowage.held == held, "the tail is not accounted for once"
        tail, first = table.count - table.base, hot.holder[..., 0, :]
        assert (first[..., :tail] == torch.arange(table.base, table.count)).all()
        assert (first[..., tail : -(-(tail + 1) // 3) * 3] == -1).all(), "rows of slots to come are not empty"
        taken += tail
    assert taken, "no tail lies among near copies"


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_step_is_as_without_offload(folder, name):
    expected = logits_of(POLICIES[name], None)
    found = logits_of(POLICIES[name], Offload(disk=folder, block=BLOCK), check_tail)
    assert torch.equal(found, expected)


def test_no_token_is_copied_beside_its_own_slot(folder, monkeypatch):
    copied = []
    monkeypatch.setattr(StoredSlots, "_bring_tail", lambda *_: copied.append(1))
    logits_of(POLICIES["tokenselect"], Offload(disk=folder, block=BLOCK))
    assert not copied


def keeps_its_own(self, table):
    """Takes the rows without what lies in the tail."""
    self._taken = tuple(self.tensors[name][:, :, : self.room] for name in ("key", "value"))
    table.lie(*self._taken, table.base)


def forgets_nothing_behind_the_tail(self, slot, base):
    self.place[..., slot:] = -1


def empties_nothing(self, index, table):
    tail = table.count - table.base if self.is_tail(table.keys) else 0
    return hot_slots.find_places(index, self.place, self.holder, self.uses, base=table.base, tail=tail and tail - 1)


@pytest.mark.parametrize(("method", "wrong"), [
    ("take_tail", keeps_its_own),
    ("forget_from", forgets_nothing_behind_the_tail),
    ("find", empties_nothing),
])  # fmt: skip
def test_wrong_tails_are_noticed(folder, monkeypatch, method, wrong):
    expected = logits_of(POLICIES["tokenselect"], None)
    monkeypatch.setattr(HotSlots, method, wrong)
    try:
        found = logits_of(POLICIES["tokenselect"], Offload(disk=folder, block=BLOCK))
    except (IndexError, RuntimeError, ValueError):
        return
    assert not torch.equal(found, expected)


def test_rows_that_were_written_over_are_forgotten():
    """A token taken back was written over a copy; tokens that come later may leave its row alone."""
    index = torch.tensor([[[3, 4, 5]]])
    hot = HotSlots(
        RowFormat(), index, 4, 30, {"key": torch.empty(1, 2, 0, 4), "value": torch.empty(1, 2, 0, 4)}, room=6
    )
    hot._taken = hot.tensors["key"], hot.tensors["value"]
    hot.holder[0, 0] = torch.tensor([20, 21, 7, 8, -1, 9, 3, 4, 5, -1])
    hot.place[0, 0, hot.holder[0, 0, [0, 1, 2, 3, 5, 6, 7, 8]].long()] = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]).int()
    hot.forget_from(21, 20)
    assert hot.holder[0, 0].tolist() == [20, -1, -1, -1, -1, -1, 3, 4, 5, -1]
    assert {slot: row for slot, row in enumerate(hot.place[0, 0].tolist()) if row >= 0} == {20: 0, 3: 6, 4: 7, 5: 8}
