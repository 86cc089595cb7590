"""Faults planted in the package, each of which the programs of the short run must notice."""

from collections import Counter

import pytest
from cache_lanes import run_program
from cache_programs import drawn_program

from kvpress.offload.attached import Attached
from kvpress.offload.hot_slots import HotSlots
from kvpress.offload.stowage import Stowage
from kvpress.offload.working import StoredBlock
from kvpress.policies.key_index import KeyIndex


def tail_of_other_tokens(patch):
    original = HotSlots.take_tail

    def take_tail(self, table):
        original(self, table)
        table.keys.mul_(-1)

    patch.setattr(HotSlots, "take_tail", take_tail)


def copies_of_tokens_taken_back(patch):
    patch.setattr(HotSlots, "takes", lambda self, table: False)  # the last slots are copied like others
    patch.setattr(HotSlots, "forget_from", lambda self, slot, base: None)


def copies_of_other_rows(patch):
    patch.setattr(HotSlots, "select_batch", lambda self, rows: None)


def index_of_tokens_taken_back(patch):
    patch.setattr(KeyIndex, "crop", lambda self, slots: None)


def blocks_of_other_rows(patch):
    patch.setattr(StoredBlock, "selected", lambda self, rows: self)


def blocks_of_tokens_taken_back(patch):
    original = Stowage.cut

    def cut(self, table):
        if table.count >= table.base:
            original(self, table)
            return
        listed = list(self._blocks.listed)
        original(self, table)
        self._blocks.listed[:] = listed[: len(self._blocks.listed)][::-1]

    patch.setattr(Stowage, "cut", cut)


def blocks_that_nobody_relies_on(patch):
    patch.setattr(Attached, "fork", lambda self: Attached(self.options, self.device, self._shared))


@pytest.mark.parametrize(("plant", "name"), [
    (tail_of_other_tokens, "quest"),
    (copies_of_tokens_taken_back, "tokenselect int8"),
    (copies_of_other_rows, "quest"),
    (index_of_tokens_taken_back, "tokenselect int8"),
    (blocks_of_other_rows, "quest"),
    (blocks_of_tokens_taken_back, "quest"),
    (blocks_that_nobody_relies_on, "quest"),
])  # fmt: skip
def test_a_planted_fault_is_noticed(plant, name, folder, monkeypatch):
    plant(monkeypatch)
    for seed in range(14):
        (folder / str(seed)).mkdir()
        try:
            run_program(drawn_program(name, seed), folder / str(seed), Counter())
        except (TypeError, AttributeError):  # a plant that does not fit the package any more
            raise
        except Exception:  # shapes that do not fit, too
            return
    pytest.fail("it was not noticed")
