"""The near rows of a table whose blocks lie in the tiers: its last slots, and copies of selected ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.kernels.attention.prepared import PreparedAttention
from kvpress.kernels.places import find_places
from kvpress.memory import allocate, filled
from kvpress.offload.slot_rows import NAME, RowLayout
from kvpress.row_format import RowFormat

if TYPE_CHECKING:
    from kvpress.slots import SlotTable

ROW_BYTES = 64  # slot rows begin at multiples of it: a vector that lies across two lines of the processor's cache takes longer to load

# rows emptied at once for the table's own slots to come: what they held is read again if it is still selected
AHEAD = 32


class HotSlots:
    """Rows of slots that attention reads where they lie: the first hold those behind the table's blocks, once they were taken in
    (`take_tail`), the others copies, those least used lately of which give way.

    Args:
        form: of the rows of keys and values.
        index: slots `[batch, lists, n]` like those that will be looked up, and where they lie.
        capacity: rows for copies.
        slots: that can be looked up.
        like: tensors of the copies, which of slot rows are `row_memory` of their `layout`.
        layout: of slot rows, if copies are to lie in such.

    Attributes:
        room: rows for the table's own slots, which hold copies until such slots are near.
        tensors: keys and values by name, `[batch, kv_heads, rows, dim]` as they are stored; views of `rows`, if there are slot rows.
        rows: payloads of slot rows `[batch, groups, rows, payload]` of uint8, or None.
        holder: `[batch, lists, rows]` int32 which slot lies in each row, -1 for none; one list where all KV heads select the same.
        place: `[batch, lists, slots]` int32 in which row each slot lies, -1 for none.
        uses: `[batch, lists, rows]` int32 how much each row was read lately.
        attention: over the rows.
    """

    def __init__(
        self,
        form: RowFormat,
        index: Tensor,
        capacity: int,
        slots: int,
        like: dict[str, Tensor],
        layout: RowLayout | None = None,
        room: int = 0,
    ) -> None:
        lists, rows = index.shape[:2], room + capacity
        self.form, self.room, self._layout = form, room, layout
        self.holder = filled((*lists, rows), -1, index, torch.int32)
        self.uses = filled((*lists, rows), 0, index, torch.int32)
        self.place = filled((*lists, slots), -1, index, torch.int32)
        self._memory = {
            name: allocate((*each.shape[:2], rows, each.shape[-1]), index, each.dtype).zero_()
            for name, each in like.items()
        }
        self._open()

    @property
    def capacity(self) -> int:
        """Copies that there is room for, per list."""
        return self.holder.shape[-1] - self.room

    def fits(self, index: Tensor) -> bool:
        """Whether slots `index [batch, lists, n]` can be looked up at once."""
        return self.holder.shape[:2] == index.shape[:2] and index.shape[-1] <= self.capacity

    def takes(self, table: SlotTable) -> bool:
        """Whether the slots of `table` behind its blocks should lie in the first rows, and do not."""
        return 0 < table.count - table.base <= self.room and not self.is_tail(table.keys)

    def _open(self) -> None:
        self.tensors: dict[str, Tensor] = self._memory
        self.rows: Tensor | None = None
        if self._layout is not None:
            self.rows = self._memory[NAME][..., : self._layout.payload]
            self.tensors = self._layout.unpack(self.rows)
        self.attention = PreparedAttention(*self.form.readable(self.tensors["key"], self.tensors["value"], {}))
        self._taken: tuple[Tensor, Tensor] | None = None  # keys and values of the first rows, while they are a table's

    def held(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self._memory.values(), self.holder, self.uses, self.place]

    def widen(self, slots: int) -> None:
        """Room in `place` for `slots` slots."""
        roomy = filled((*self.place.shape[:2], slots), -1, self.place, torch.int32)
        roomy[..., : self.place.shape[-1]] = self.place
        self.place = roomy

    def take_tail(self, table: SlotTable) -> None:
        """Let the slots of `table` behind its blocks lie in the first rows from now on."""
        held = table.count - table.base
        keys, values = (self.tensors[name][:, :, : self.room] for name in ("key", "value"))
        for rows, part in ((keys, table.keys), (values, table.values)):
            rows[:, :, :held] = part[:, :, :held]
        self._taken = keys, values
        table.lie(keys, values, table.base)

    def is_tail(self, keys: Tensor) -> bool:
        """Whether these are the keys of the first rows."""
        return self._taken is not None and keys is self._taken[0]

    def find(self, index: Tensor, table: SlotTable) -> tuple[Tensor, Tensor]:
        """Places of slots `index [batch, lists, n]` of `table`, and the flat entries of those that had none: see `find_places`."""
        tail = vacant = 0
        if self.is_tail(table.keys):
            tail = table.count - table.base
            vacant = self.vacant(tail)
        return find_places(index, self.place, self.holder, self.uses, tail=tail, base=table.base, vacant=vacant)

    def vacant(self, tail: int) -> int:
        """Rows behind the `tail` first ones that are kept empty."""
        return min(AHEAD - tail % AHEAD, self.room - tail)

    def forget(self, index: Tensor, entries: Tensor) -> None:
        """The copies of the slots in the flat `entries` of `index [batch, lists, n]` were not made after all."""
        lists, count = index.shape[1:]
        row, group = entries // (lists * count), entries // count % lists
        slot = index.view(-1)[entries]
        self.holder[row, group, self.place[row, group, slot].long()] = -1
        self.place[row, group, slot] = -1

    def forget_from(self, slot: int, base: int) -> None:
        """Slots from `slot` on hold other tokens from now on; those from `base` on lie behind the table's blocks."""
        self.place[..., slot:] = -1
        self.holder.masked_fill_(self.holder >= slot, -1)
        if self._taken is not None:  # tokens taken back were written over the copies in these rows
            held = self.holder[..., max(slot - base, 0) : self.room]
            row, column, entry = (held >= 0).nonzero(as_tuple=True)
            self.place[row, column, held[row, column, entry].long()] = -1
            held[:] = -1

    def select_batch(self, rows: Sequence[int]) -> None:
        """Row `i` becomes what row `rows[i]` was."""
        index = torch.tensor(rows, device=self.holder.device)
        if self.capacity:
            self.holder, self.place, self.uses = self.holder[index], self.place[index], self.uses[index]
            self._memory = {name: tensor[index] for name, tensor in self._memory.items()}
            self._open()


def row_memory(layout: RowLayout, batch: int) -> dict[str, Tensor]:
    """What memory for the payloads of slot rows is like, each at a multiple of `ROW_BYTES`: `[batch, groups, 0, bytes]` of uint8."""
    width = -(-layout.payload // ROW_BYTES) * ROW_BYTES
    return {NAME: torch.empty(batch, layout.groups, 0, width, dtype=torch.uint8)}
