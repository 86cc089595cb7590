"""Broken variants of the code: each must be noticed by the tests named beside it."""

import pytest
import torch
from test_edges import test_crop_is_exact_while_recording as crop_is_exact
from test_finite_budget import test_equals_dense_attention_over_kept_positions as equals_dense
from test_finite_budget import test_padded_row_equals_the_same_prompt_alone as padded_equals_alone
from test_policy_table import test_budgets_hold_at_every_step_and_turn as budgets_hold
from test_shared_positions import test_heads_have_positions_of_their_own_once_they_keep_other_tokens as heads_apart

import kvpress.eviction
import kvpress.keeper
from kvpress import PolicyCache
from kvpress.columns import Columns
from kvpress.keeper import Keeper
from kvpress.prepared import PreparedSlots
from kvpress.slots import POSITION, SlotTable
from kvpress.testing.families import random_tokens, tiny_model


def off_by_one_survivors(patch):
    original = kvpress.eviction.survivors
    patch.setattr(kvpress.keeper, "survivors", lambda scores, counts: (original(scores, counts) - 1).clamp(min=0))


def positions_one_too_late(patch):
    original = SlotTable.place

    def place(self, new, positions, counts):
        original(
            self, new, positions + (positions >= 0) if isinstance(positions, torch.Tensor) else positions + 1, counts
        )

    patch.setattr(SlotTable, "place", place)


def padding_is_scored(patch):
    original = kvpress.eviction.ranked

    def ranked(scores, positions, sinks, first_recent):
        return original(scores, positions.clamp(min=0), sinks, first_recent)

    patch.setattr(kvpress.keeper, "ranked", ranked)


def evicted_token_stays_visible(patch):
    """Retired in name only: the next token goes over the slot beside it."""
    original = SlotTable.retire

    def retire(self, slot):
        original(self, (slot + 1) % self.count)
        self.reported = slot

    def kept(self):
        spare, self.spare = self.spare, getattr(self, "reported", self.spare)
        try:
            return original_kept(self)
        finally:
            self.spare = spare

    original_kept = SlotTable.kept_positions
    patch.setattr(SlotTable, "retire", retire)
    patch.setattr(SlotTable, "kept_positions", kept)


def reorder_skips_positions(patch):
    original = SlotTable.select_batch

    def select(self, index):
        before = self.columns.get(POSITION)
        original(self, index)
        if before is not None and before.shape == self.columns[POSITION].shape:
            self.columns[POSITION] = before

    patch.setattr(SlotTable, "select_batch", select)


def positions_go_to_one_head_of_several(patch):
    """As if heads agreed for ever."""
    original = PreparedSlots.place

    def place(self, slot, positions):
        (column,) = self._position.columns
        others = column[:, 1:].clone()
        original(self, slot, positions)
        column[:, 1:] = others

    patch.setattr(PreparedSlots, "place", place)


def an_eviction_leaves_heads_together(patch):
    original = Columns.taken

    def taken(self, index, empty, capacity):
        made = original(self, index, empty, capacity)
        return Columns(made | {POSITION: made[POSITION][:, :1].expand_as(made[POSITION]).clone()})

    patch.setattr(Columns, "taken", taken)


def reorder_skips_values(patch):
    original = SlotTable.select_batch

    def select(self, index):
        before = self.values
        original(self, index)
        if before is not None and before.shape == self.values.shape:
            self.values = before

    patch.setattr(SlotTable, "select_batch", select)


def keys_and_values_in_different_order(patch):
    original = SlotTable.keep

    def keep(self, index, capacities, room):
        original(self, index, capacities, room)
        self.values = self.values.flip(2)

    patch.setattr(SlotTable, "keep", keep)


def a_new_token_starts_with_a_score(patch):
    """The column of an overwritten slot is not cleared but set."""
    original = PreparedSlots.overwrite

    def overwrite(self, slot, keys, values):
        original(self, slot, keys, values)
        for column in self._columns.columns:
            column.scatter_(-1, slot, 50.0)

    patch.setattr(PreparedSlots, "overwrite", overwrite)


def budget_is_one_too_large(patch):
    original = Keeper._allocate
    patch.setattr(Keeper, "_allocate", lambda self, observation: original(self, observation) + 1)


def crop_forgets_one_token(patch):
    original = SlotTable.drop_last
    patch.setattr(SlotTable, "drop_last", lambda self, tokens: original(self, max(tokens - 1, 0)))


def dense(*case):
    return lambda: equals_dense(*case)


NOTICED = [
    (off_by_one_survivors, lambda: budgets_hold("streaming_llm")),
    (positions_one_too_late, dense("streaming_llm", "llama", "padded_batch")),
    (padding_is_scored, lambda: padded_equals_alone("streaming_llm", "llama")),
    (padding_is_scored, lambda: padded_equals_alone("random", "llama")),
    (evicted_token_stays_visible, dense("tova", "llama", "greedy")),
    (reorder_skips_positions, dense("tova", "llama", "beams")),
    (positions_go_to_one_head_of_several, lambda: heads_apart(ragged=False)),
    (an_eviction_leaves_heads_together, dense("h2o", "llama", "greedy")),
    (reorder_skips_values, dense("tova", "llama", "beams")),
    (keys_and_values_in_different_order, dense("snapkv", "llama", "turns")),
    (budget_is_one_too_large, lambda: budgets_hold("tova")),
    (crop_forgets_one_token, lambda: crop_is_exact("snapkv", 12, 2)),
    (crop_forgets_one_token, dense("snapkv", "llama", "prompt_lookup")),
]


@pytest.mark.parametrize(
    ("sabotage", "test"), NOTICED, ids=[f"{i}-{broken.__name__}" for i, (broken, _) in enumerate(NOTICED)]
)
def test_a_broken_variant_is_noticed(sabotage, test, monkeypatch):
    test()  # passes as the code is
    with monkeypatch.context() as patch:
        sabotage(patch)
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            test()


def test_a_column_that_is_not_cleared_is_noticed(monkeypatch):
    """Kept sets change; that they are right as the code is, `tests/policies` checks."""

    def kept():
        model = tiny_model("llama", dtype=torch.float64)
        cache = PolicyCache(model, "h2o", budget=6, recent=0.0)
        model.generate(random_tokens(1, 24), past_key_values=cache, max_new_tokens=24, do_sample=False)
        return cache.kept_positions(0).tolist()

    right = kept()
    a_new_token_starts_with_a_score(monkeypatch)
    assert kept() != right
