"""Selected slots of a table whose blocks lie in the tiers: near copies of the ones used last, and the blocks of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from kvpress.memory import filled, growth
from kvpress.offload.errors import TierFullError
from kvpress.offload.slot_rows import NAME as SLOT_ROWS
from kvpress.offload.slot_rows import RowLayout, RowsWanted
from kvpress.row_format import PackedRows, Rows, unpacked

if TYPE_CHECKING:
    from kvpress.offload.stowage import Stowage
    from kvpress.slots import SlotTable

SPARE = 2  # near copies for so many times the slots that one forward reads


class HotSlots:
    """Copies of slots, the least recently read of which give way.

    Attributes:
        tensors: by name, `[batch, kv_heads, capacity, dim]`, or slot rows `[batch, groups, capacity, width]`.
        slot: `[batch, heads, capacity]` which slot each copy is of, -1 for none; `heads` is 1 where all KV heads select the same.
        place: `[batch, heads, slots]` where the copy of each slot is, -1 for nowhere.
        used: `[batch, heads, capacity]` the last forward that read it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget and free everything."""
        self.tensors: dict[str, Tensor] = {}
        self.slot = self.place = self.used = torch.empty(0, 0, 0, dtype=torch.long)
        self.now = 0

    @property
    def capacity(self) -> int:
        """Copies that there is room for, per head."""
        return self.slot.shape[-1]

    def fits(self, index: Tensor, wanted: int) -> bool:
        """Whether slots of `index [batch, heads, n]` can be looked up, `wanted` of them at once."""
        return self.slot.shape[:2] == index.shape[:2] and wanted <= self.capacity

    def make(self, index: Tensor, capacity: int, slots: int, like: dict[str, Tensor]) -> None:
        """Begin anew with room for `capacity` copies."""
        batch, heads, _ = index.shape
        self.tensors = {
            name: filled((*each.shape[:2], capacity, each.shape[-1]), 0, index, each.dtype)
            for name, each in like.items()
        }
        self.slot = filled((batch, heads, capacity), -1, index, torch.long)
        self.used = filled((batch, heads, capacity), -1, index, torch.long)
        self.place = filled((batch, heads, slots), -1, index, torch.int32)
        self.now = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), self.slot, self.used, self.place))

    def widen(self, slots: int) -> None:
        """Room in `place` for `slots` slots."""
        roomy = filled((*self.place.shape[:2], slots), -1, self.place, self.place.dtype)
        roomy[..., : self.place.shape[-1]] = self.place
        self.place = roomy

    def find(self, slot: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Places `[batch, heads, n]` of `slot`, given to those that had none, and which these are; only where `wanted`."""
        self.now += 1
        place = self.place.gather(-1, slot).long()
        missing = wanted & (place < 0)
        hit = (wanted & ~missing).nonzero(as_tuple=True)
        self.used[hit[0], hit[1], place[hit]] = self.now
        if bool(missing.any()):
            batch, head, entry = missing.nonzero(as_tuple=True)
            number = missing.cumsum(dim=-1)[batch, head, entry] - 1  # among its head's missing ones
            oldest = self.used.topk(int(number.max()) + 1, dim=-1, largest=False, sorted=True).indices
            given = oldest[batch, head, number]
            old = self.slot[batch, head, given]
            held = old >= 0
            self.place[batch[held], head[held], old[held]] = -1
            new = slot[batch, head, entry]
            self.slot[batch, head, given] = new
            self.used[batch, head, given] = self.now
            self.place[batch, head, new] = given.int()
            place[batch, head, entry] = given
        return place, missing

    def forget(self, slot: Tensor, place: Tensor, missing: Tensor) -> None:
        """The copies of `missing` slots were not made after all."""
        batch, head, entry = missing.nonzero(as_tuple=True)
        self.place[batch, head, slot[batch, head, entry]] = -1
        self.slot[batch, head, place[batch, head, entry]] = -1

    def select_batch(self, rows: Sequence[int]) -> None:
        """Row `i` becomes what row `rows[i]` was."""
        index = torch.tensor(rows, device=self.slot.device)
        if self.capacity:
            with torch.inference_mode(False), torch.no_grad():
                self.tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
                self.slot, self.place, self.used = self.slot[index], self.place[index], self.used[index]


class StoredSlots:
    """Stands for the keys `[batch, kv_heads, slots, dim]` of a table whose first slots lie in the tiers: reads what is asked of it.

    It knows the shape, a range of the last slots (`keys[:, :, first:last]`), and some slots of each head (`take`).
    """

    def __init__(self, stowage: Stowage, table: SlotTable) -> None:
        self._stowage, self._table = stowage, table
        self._read: tuple[int, Tensor] | None = None  # the keys from a slot on that were asked for last

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the keys."""
        batch, heads = self._table.keys.shape[:2]
        return batch, heads, self._table.count, self._table.dims[0]

    @property
    def device(self) -> torch.device:
        """As of the keys."""
        return self._table.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """As of the keys."""
        return self._table.dtype

    def __getitem__(self, item: tuple[slice, slice, slice]) -> Tensor:
        """Keys of consecutive slots, in the model's type.

        Raises:
            TierError: a block is lost or cannot be read, or there is no room to put them together.
        """
        return unpacked(self.part(*item))

    def part(self, batch: slice, heads: slice, slots: slice) -> Rows:
        """As `[]`, in the form in which they are stored."""
        first, last, _ = slots.indices(self._table.count)
        start, keys = self._between(first, last)
        return self._rows(keys[batch, heads, first - start : last - start])

    def _rows(self, stored: Tensor) -> Rows:
        form = self._table.form
        return stored if form.plain else PackedRows(stored, form, self._table.dtype)

    def _between(self, first: int, last: int) -> tuple[int, Tensor]:
        """A slot not behind `first`, and the keys from there to slot `last - 1` or beyond."""
        table = self._table
        if first >= table.base:
            return table.base, table.keys
        if self._read is None or self._read[0] > first or self._read[0] + self._read[1].shape[2] < last:
            self._read = self._stowage.keys_between(table, first, last)
        return self._read

    def take(self, index: Tensor) -> tuple[Rows, Rows]:
        """Keys and values `[batch, kv_heads, n, dim]` of the slots `index [batch, kv_heads or 1, n]`, as they are stored; any for `-1`.

        Raises:
            TierError: a block is lost or cannot be read, or there is no room for the copies.
        """
        with torch.inference_mode(False), torch.no_grad():
            keys, values = self._take(index.clone() if index.is_inference() else index)
        return self._rows(keys), self._rows(values)

    def _take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table
        slot = index.clamp(min=0)
        stored, near = (index >= 0) & (slot < table.base), (index >= 0) & (slot >= table.base)
        tail = {"key": table.keys, "value": table.values}
        if self._hot.capacity and self._hot.place.shape[-1] < table.base:
            self._widen(index)
        if not self._hot.fits(index, index.shape[-1]):
            self._make(index, tail)
        hot = self._hot
        place, missing = hot.find(slot.clamp(max=table.base - 1), stored)
        if bool(missing.any()):
            try:
                self._bring(slot, place, missing)
            except BaseException:
                hot.forget(slot, place, missing)
                raise
        place = torch.where(stored, place, 0)
        batch, head, entry = near.nonzero(as_tuple=True)
        behind = slot[batch, head, entry] - table.base
        heads: Any = slice(None) if index.shape[1] == 1 else head
        if SLOT_ROWS in hot.tensors and (layout := self._stowage.blocks[0].layout) is not None:
            words = hot.tensors[SLOT_ROWS].view(torch.int64)  # a gather takes as long for a byte as for eight
            taken = layout.unpack(_rows(words, place).view(torch.uint8))
        else:
            taken = {name: _rows(hot.tensors[name], place) for name in tail}
        for name, rows in tail.items():
            if index.shape[:2] == (1, 1):
                taken[name].index_copy_(2, entry, rows.index_select(2, behind))
            else:
                taken[name][batch, heads, entry] = rows[batch, heads, behind]
        return taken["key"], taken["value"]

    @property
    def _hot(self) -> HotSlots:
        return self._stowage.hot_slots()

    def _widen(self, index: Tensor) -> None:
        """Room to look up all slots in the tiers, and some to come."""
        slots = self._table.base + growth(self._table.base)
        self._stowage.make_room(index.shape[0] * index.shape[1] * slots * torch.int32.itemsize)
        self._hot.widen(slots)

    def _make(self, index: Tensor, like: dict[str, Tensor]) -> None:
        stowage, wanted, slots = self._stowage, index.shape[-1], self._table.count
        layout = stowage.blocks[0].layout
        if layout is not None and layout.groups == index.shape[1] and stowage.attached.manager.computes_in_host_memory:
            rows = torch.empty(*layout.shape(index.shape[0]), dtype=torch.uint8, device="meta")
            like = {SLOT_ROWS: rows}
        per_slot = sum(each.shape[0] * each.shape[1] * each.shape[-1] * each.element_size() for each in like.values())
        per_slot += index.shape[0] * index.shape[1] * 16
        fixed = index.shape[0] * index.shape[1] * 4 * (slots + growth(slots))
        stowage.cool()
        share, capacity = stowage.attached.share(), SPARE * wanted
        if share is not None and stowage.reads_rows:
            capacity = min(max((share - stowage.held - fixed) // per_slot, wanted), capacity)
        if not stowage.may_hold(capacity * per_slot + fixed):
            capacity = wanted
            try:
                stowage.must_hold(capacity * per_slot + fixed)
            except TierFullError:  # what was put together for the selection has served
                self._read = None
                stowage.attached.release(stowage.layer)
                stowage.must_hold(capacity * per_slot + fixed)
        self._hot.make(index, capacity, slots + growth(slots), like)

    def _bring(self, slot: Tensor, place: Tensor, missing: Tensor) -> None:
        """Copy the missing slots to their places, block by block."""
        size = self._stowage.attached.options.block
        entries = missing.nonzero()
        batch, head, entry = entries.unbind(-1)
        source, target = slot[batch, head, entry], place[batch, head, entry]
        if SLOT_ROWS in self._hot.tensors and (layout := self._stowage.blocks[0].layout) is not None:
            self._bring_rows(layout, batch, head, source, target)
            return
        heads: Any = slice(None) if slot.shape[1] == 1 else head
        names = ["key", "value"]
        if self._read is not None and bool((source >= self._read[0]).all() & (source < self._end_of_read).all()):
            start, keys = self._read
            self._hot.tensors["key"][batch, heads, target] = keys[batch, heads, source - start]
            names = ["value"]
        order = (source // size).argsort(stable=True)
        numbers, counts = (source // size)[order].unique_consecutive(return_counts=True)
        for number, chosen in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            some: Any = heads if isinstance(heads, slice) else heads[chosen]
            rows, goes = batch[chosen], target[chosen]
            inside = source[chosen] - number * size
            block = self._stowage.blocks[number]
            old = rows if block.rows is None else torch.tensor(block.rows, device=rows.device)[rows]
            for name, tensor in self._stowage.block_tensors(self._table, block, names):
                item = (each if isinstance(each, slice) else each.to(tensor.device) for each in (old, some, inside))
                self._hot.tensors[name][rows, some, goes] = tensor[tuple(item)].to(self.device)

    @property
    def _end_of_read(self) -> int:
        return 0 if self._read is None else self._read[0] + self._read[1].shape[2]

    def _bring_rows(self, layout: RowLayout, batch: Tensor, head: Tensor, source: Tensor, target: Tensor) -> None:
        """As `_bring`, row by row into place: nothing else of a block is read."""
        stowage, size, batches = self._stowage, self._stowage.attached.options.block, self._table.keys.shape[0]
        order = ((source // size * batches + batch) * layout.groups + head) * size + source % size
        order = order.argsort()
        slots, row, group, goes = (each[order].cpu().numpy() for each in (source, batch, head, target))
        numbers = slots // size
        firsts = numpy.concatenate([[0], numpy.flatnonzero(numpy.diff(numbers)) + 1, [len(slots)]])
        blocks = [stowage.blocks[number] for number in numbers[firsts[:-1]].tolist()]
        old = row
        if any(block.rows is not None for block in blocks):
            rows_then = numpy.array([block.rows or range(block.batch) for block in blocks])
            old = rows_then[numpy.repeat(numpy.arange(len(blocks)), numpy.diff(firsts)), row]
        places = (row * layout.groups + group) * self._hot.capacity + goes
        wanted = RowsWanted((old * layout.groups + group) * size + slots % size, firsts, places)
        out = self._hot.tensors[SLOT_ROWS].view(-1, layout.width)
        stowage.attached.manager.read_rows([block.keys[0] for block in blocks], wanted, layout, out)


def _rows(tensor: Tensor, slot: Tensor) -> Tensor:
    """Slots `[batch, heads or 1, n]` of `tensor [batch, heads, slots, dim]`."""
    if slot.shape[:2] == (1, 1):
        return tensor.index_select(2, slot[0, 0])
    batch, heads = tensor.shape[:2]
    slot = slot.expand(batch, heads, -1)
    row = torch.arange(batch, device=tensor.device)[:, None, None]
    head = torch.arange(heads, device=tensor.device)[None, :, None]
    return tensor[row, head, slot]
