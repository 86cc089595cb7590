"""Stands for the keys of a table whose first slots lie in the tiers, and brings the selected ones near."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from kvpress.kernels.places import rows_to_read
from kvpress.offload.hot_slots import HotSlots
from kvpress.offload.row_source import RowSource
from kvpress.offload.slot_rows import RowsWanted
from kvpress.row_format import PackedRows, Rows, unpacked

if TYPE_CHECKING:
    from kvpress.offload.stowage import Stowage
    from kvpress.slots import SlotTable


class StoredSlots:
    """Stands for the keys `[batch, kv_heads, slots, dim]` of a table whose first slots lie in the tiers: reads what is asked of it.

    It knows the shape, a range of slots (`keys[:, :, first:last]`), and where near copies of some slots of each head lie (`places`).
    """

    def __init__(self, stowage: Stowage, table: SlotTable) -> None:
        self._stowage, self._table = stowage, table
        self._read: tuple[int, Tensor] | None = None  # the keys from a slot on that were asked for last
        self._hot: HotSlots | None = None

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
            self._read = self._stowage.gathered_slots.keys_between(table, first, last)
        return self._read

    @property
    def copies(self) -> tuple[Rows, Rows]:
        """Keys and values `[batch, kv_heads, rows, dim]` of the near copies that `places` spoke of."""
        if self._hot is None:
            raise RuntimeError("no slots were asked for")
        return self._rows(self._hot.tensors["key"]), self._rows(self._hot.tensors["value"])

    def places(self, index: Tensor) -> tuple[Tensor, HotSlots]:
        """Places `[batch, lists, n]` of the slots `index [batch, lists, n]` among the near copies, `-1` for `-1`; and these. `lists` is
        1, or one for each KV head.

        Raises:
            TierError: a block is lost or cannot be read, or there is no room for the copies.
        """
        index = index.contiguous()
        self._hot = hot = self._stowage.copies.ready(self._table, index, self._let_go)
        places, missing = hot.find(index, self._table)
        if len(missing):
            with torch.inference_mode(False), torch.no_grad():
                self.bring(hot, index, places, missing)
        return places, hot

    def _let_go(self) -> None:
        """What was put together for the selection has served."""
        self._read = None
        self._stowage.attached.release(self._stowage.layer)

    def bring(self, hot: HotSlots, index: Tensor, places: Tensor, missing: Tensor) -> None:
        """Copy the slots of the flat entries `missing` of `index` to their places.

        Raises:
            TierError: not all could be had; none of them has a place then.
        """
        stored = missing
        try:
            if not hot.is_tail(self._table.keys):
                near = index.view(-1)[missing] >= self._table.base
                if near.any():
                    self._bring_tail(hot, _Wanted.of(missing[near], index, places))
                    stored = missing[~near]
            if len(stored) and hot.rows is not None:
                self._bring_rows(hot.rows, index, places, stored)
            elif len(stored):
                self._bring_parts(hot, _Wanted.of(stored, index, places))
        except BaseException:
            hot.forget(index, missing)
            raise

    def _bring_tail(self, hot: HotSlots, wanted: _Wanted) -> None:
        """From the table's own memory."""
        row, heads, slot, place = wanted.tensors(self.device, one_list=hot.holder.shape[1] == 1)
        slot = slot - self._table.base
        for name, tail in (("key", self._table.keys), ("value", self._table.values)):
            hot.tensors[name][row, heads, place] = tail[row, heads, slot]

    def _bring_parts(self, hot: HotSlots, wanted: _Wanted) -> None:
        """Block by block."""
        size, one_list = self._stowage.attached.options.block, hot.holder.shape[1] == 1
        names = ["key", "value"]
        if self._read is not None and wanted.slot.min() >= self._read[0] and wanted.slot.max() < self._end_of_read:
            start, keys = self._read
            row, heads, slot, place = wanted.tensors(self.device, one_list)
            hot.tensors["key"][row, heads, place] = keys[row, heads, slot - start]
            names = ["value"]
        order = (wanted.slot // size).argsort(kind="stable")
        numbers, firsts = numpy.unique(wanted.slot[order] // size, return_index=True)
        for number, chosen in zip(numbers.tolist(), numpy.split(order, firsts[1:]), strict=True):
            row, heads, slot, place = wanted.some(chosen).tensors(self.device, one_list)
            inside = slot - number * size
            block = self._stowage.blocks[number]
            old = row if block.rows is None else torch.tensor(block.rows, device=row.device)[row]
            for name, tensor in self._stowage.block_tensors(self._table, block, names):
                item = (each if isinstance(each, slice) else each.to(tensor.device) for each in (old, heads, inside))
                hot.tensors[name][row, heads, place] = tensor[tuple(item)].to(self.device)

    @property
    def _end_of_read(self) -> int:
        return 0 if self._read is None else self._read[0] + self._read[1].shape[2]

    def _bring_rows(self, rows: Tensor, index: Tensor, places: Tensor, entries: Tensor) -> None:
        """Row by row into place among `rows`: nothing else of a block is read."""
        source = self._source()
        found = rows_to_read(
            entries,
            index,
            places,
            rows=rows.shape[2],
            block=source.layout.slots,
            blocks=len(source.keys),
            then=source.batch_rows,
        )
        self._stowage.attached.manager.read_rows(source, RowsWanted(*found), rows.flatten(0, 2))

    def _source(self) -> RowSource:
        """The blocks, for reading rows of them."""
        stowage, blocks = self._stowage, self._stowage.blocks
        layout = blocks[0].layout
        if layout is None:
            raise RuntimeError("these blocks do not lie in slot rows")
        if stowage.row_source is None or stowage.row_source.layout is not layout:
            stowage.row_source = RowSource(layout)
        stowage.row_source.follow(blocks)
        return stowage.row_source


class _Wanted:
    """Slots to bring near: batch row, list, slot, and place among the copies of that list, each `[n]` int64."""

    def __init__(self, row: numpy.ndarray, group: numpy.ndarray, slot: numpy.ndarray, place: numpy.ndarray) -> None:
        self.row, self.group, self.slot, self.place = row, group, slot, place

    @classmethod
    def of(cls, entries: Tensor, index: Tensor, places: Tensor) -> _Wanted:
        """Those of the flat `entries` of `index [batch, lists, n]` and of their `places`."""
        chosen = entries.cpu().numpy()
        slot, place = (each.view(-1).cpu().numpy()[chosen] for each in (index, places))
        if index.shape[0] == index.shape[1] == 1:
            return cls(none := numpy.zeros_like(slot), none, slot, place)
        return cls(*numpy.divmod(chosen // index.shape[-1], index.shape[1]), slot, place)

    def some(self, which: numpy.ndarray) -> _Wanted:
        """Those of a list of numbers."""
        return _Wanted(self.row[which], self.group[which], self.slot[which], self.place[which])

    def tensors(self, device: torch.device, one_list: bool) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Batch row, KV heads, slot and place to index tensors with: all heads where they have one list."""
        row, group, slot, place = (
            torch.from_numpy(each).to(device) for each in (self.row, self.group, self.slot, self.place)
        )
        return row, slice(None) if one_list else group, slot, place
