"""The near copies of one layer: when there are some and how many, and when the table's last slots lie among them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.memory import growth, held_bytes
from kvpress.offload.errors import TierFullError
from kvpress.offload.gathered import allocated
from kvpress.offload.hot_slots import HotSlots, row_memory

if TYPE_CHECKING:
    from kvpress.offload.stowage import Stowage
    from kvpress.slots import SlotTable

LISTS = 3  # like the one of selected slots that a selection may keep, and that are not accounted for yet
SPARE = 2  # near copies for so many times the slots that one forward reads


class NearCopies:
    """Makes near copies where there is room for them, and gives them up.

    Args:
        stowage: of the layer, which accounts for them.
    """

    def __init__(self, stowage: Stowage) -> None:
        self._stowage = weakref.proxy(stowage)  # a cycle would keep the cache's memory until the collector comes by
        self.slots: HotSlots | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [] if self.slots is None else self.slots.held()

    def hold_tail(self, table: SlotTable) -> bool:
        """Whether the slots behind the blocks lie here."""
        return self.slots is not None and self.slots.is_tail(table.keys)

    def ready(self, table: SlotTable, index: Tensor, let_go: Callable[[], None]) -> HotSlots:
        """Copies among which the slots `index [batch, lists, n]` can be looked up.

        Args:
            let_go: gives up what was put together for the selection, where room is short.

        Raises:
            TierFullError: there is no room for them.
        """
        slots = self.slots
        if slots is not None and slots.fits(index) and slots.place.shape[-1] >= table.count and not slots.takes(table):
            return slots
        with torch.inference_mode(False), torch.no_grad():
            if slots is None or not slots.fits(index):
                slots = self._made(table, index, let_go)
            elif slots.place.shape[-1] < table.count:
                slots = self._widened(table, index, let_go)
            self.take_tail(table)
        return slots

    def _widened(self, table: SlotTable, index: Tensor, let_go: Callable[[], None]) -> HotSlots:
        """Room to look up all slots, and some to come."""
        count = table.count + growth(table.count)
        self._stowage.make_room(index.shape[0] * index.shape[1] * count * torch.int32.itemsize)
        slots = self.slots or self._made(table, index, let_go)  # making room may have cost the copies
        slots.widen(count)
        return slots

    def _made(self, table: SlotTable, index: Tensor, let_go: Callable[[], None]) -> HotSlots:
        stowage, wanted = self._stowage, index.shape[-1]
        batch, lists, _ = index.shape
        like, layout = {"key": table.keys, "value": table.values}, stowage.blocks[0].layout
        room = stowage.attached.options.block
        if layout is None or layout.groups != lists or not stowage.attached.manager.computes_in_host_memory:
            layout, room = None, 0  # the tail's own buffers serve
        else:
            like = row_memory(layout, batch)
        per_slot = sum(batch * each.shape[1] * each.shape[-1] * each.element_size() for each in like.values())
        per_slot += batch * lists * 8
        count = table.count + growth(table.count)
        fixed = batch * lists * 4 * count
        self.give_up(table)
        share, capacity = stowage.attached.share(), SPARE * wanted
        if share is not None and stowage.reads_rows:
            left = share - stowage.held - fixed - LISTS * index.nbytes
            left += held_bytes([table.keys, table.values]) - room * per_slot if room else 0
            capacity = min(max(left // per_slot, wanted), capacity)
        with stowage.attached.aside_in_use():  # for the moment at which the tail lies in two places
            if not stowage.holds_in_place_of_tables((room + capacity) * per_slot + fixed):
                capacity, room = wanted, 0
                try:
                    stowage.must_hold(capacity * per_slot + fixed)
                except TierFullError:
                    let_go()
                    stowage.must_hold(capacity * per_slot + fixed)
            self.slots = HotSlots(table.form, index, capacity, count, like, layout, room)
            self.take_tail(table)
        return self.slots

    def take_tail(self, table: SlotTable) -> None:
        """Let the slots behind the blocks lie here, where there is room for them."""
        if self.slots is not None and self.slots.takes(table):
            freed = held_bytes([table.keys, table.values])
            self.slots.take_tail(table)
            self._stowage.release(freed)

    def give_up(self, table: SlotTable | None) -> None:
        """The tiers hold the slots copied here anyway; those of the tail get buffers of their own."""
        slots, self.slots = self.slots, None
        if slots is not None:
            with self._stowage.attached.aside_in_use():  # for the moment at which the tail lies in two places
                freed = held_bytes(slots.held()) - (0 if table is None else self._part_tail(table, slots))
            self._stowage.release(freed)

    def _part_tail(self, table: SlotTable, slots: HotSlots) -> int:
        """Buffers of its own for a tail that lies in `slots`; returns their bytes."""
        gathered = self._stowage.gathered_slots
        lying = gathered.tail or (table.keys, table.values)
        if not slots.is_tail(lying[0]):
            return 0
        own = allocated(table, lying[0].shape[2])
        for to, part in zip(own, lying, strict=True):
            to.copy_(part)
        if gathered.tail is None:
            table.lie(*own, table.base)
        else:
            gathered.tail = own
        return held_bytes(own)

    def cut(self, table: SlotTable) -> None:
        """Slots from `table.count` on hold other tokens from now on."""
        if self.slots is not None:
            self.slots.forget_from(table.count, table.base)

    def select_batch(self, table: SlotTable, rows: Sequence[int]) -> None:
        """Batch row `i` becomes what row `rows[i]` was; the table has seen to its own slots."""
        if self.slots is not None:
            self.slots.select_batch(rows)
            if table.base:
                self.take_tail(table)
