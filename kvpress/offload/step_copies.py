"""The slots of a decode step over a table in the tiers: its last slots, and near copies of those that are selected."""

from __future__ import annotations

import weakref
from array import array
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.columns import POSITION
from kvpress.kernels.places.prepared import PreparedPlaces
from kvpress.step_slots import StepSlots

if TYPE_CHECKING:
    from kvpress.kernels.attention.prepared import PreparedAttention
    from kvpress.offload.hot_slots import HotSlots
    from kvpress.offload.stowage import Stowage
    from kvpress.slots import SlotTable


class StepCopies(StepSlots):
    """Where all that a token reads and writes lies among the near copies: nothing of another size is held after it, and there is nothing to
    account for.

    Args:
        stowage: of the table.
        hot: its copies, in whose first rows the slots behind the blocks lie.
        index: slots that were just attended to there.
    """

    def __init__(self, table: SlotTable, stowage: Stowage, hot: HotSlots, index: Tensor) -> None:
        self._stowage, self._hot = weakref.ref(stowage), weakref.ref(hot)
        self._positions = weakref.ref(table.columns[POSITION])
        self._room = min(hot.place.shape[-1], table.columns[POSITION].shape[2])
        self._places = PreparedPlaces(index, hot.place, hot.holder, hot.uses)

    @classmethod
    def within(cls, table: SlotTable, index: Tensor | None) -> StepCopies | None:
        """Those of `table`, if `index` was attended to so."""
        stowage = table.stowage
        if stowage is None or index is None:
            return None
        hot = stowage.copies.slots
        if hot is None or not hot.is_tail(table.keys) or not hot.fits(index):
            return None
        if PreparedPlaces.refusal(index, hot.place, hot.holder, hot.uses) is not None:
            return None
        return cls(table, stowage, hot, index)

    def attention(self, table: SlotTable) -> PreparedAttention | None:
        hot = self._hot()
        return None if hot is None else hot.attention

    def stay(self, table: SlotTable) -> bool:
        stowage, hot, behind = self._stowage(), self._hot(), table.count - table.base
        return (
            stowage is not None
            and hot is not None
            and stowage.copies.slots is hot
            and hot.is_tail(table.keys)
            and stowage.serves_steps
            and 0
            < behind
            < stowage.attached.options.block - 1  # the last token of a block is followed by putting it away
            and table.columns[POSITION] is self._positions()
            and self._places.of_memory(hot.place)
            and table.count < self._room
        )

    def place(self, table: SlotTable) -> tuple[int, int]:
        return table.count - table.base, 0

    def places(self, table: SlotTable, index: Tensor) -> array[int] | None:
        hot, tail = self._hot(), table.count + 1 - table.base
        return None if hot is None else self._places.call_for(index.data_ptr(), tail, table.base, hot.vacant(tail))

    @property
    def found(self) -> Tensor:
        return self._places.found

    def bring(self, table: SlotTable, index: Tensor) -> None:
        stowage, hot = self._stowage(), self._hot()
        if stowage is None or hot is None:
            raise RuntimeError("the near copies of this table are gone")
        with torch.inference_mode(False), torch.no_grad():
            stowage.stored_slots(table).bring(hot, index, self._places.found, self._places.missing)

    def tensors(self) -> list[Tensor]:
        return self._places.tensors()
