"""KeyValues: the keys and values of one layer's slots, where they lie and how they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.memory import grown, growth, table_growth, take
from kvpress.ragged import RaggedRows
from kvpress.row_format import PackedRows, RowFormat

if TYPE_CHECKING:
    from kvpress.offload.stowage import Stowage

_NOTHING = torch.empty(0)


class KeyValues:
    """Keys and values of `count` slots of every batch row and KV head.

    They lie dense, `[batch, kv_heads, capacity, dim]`, or, where heads are of unequal capacity, flat, `[rows, dim]` (`RaggedRows`). In
    buffers of their own they lie in the row format `form`; a first prompt's are the model's own tensors until the end of its forward.
    With offload those of the first `base` slots lie elsewhere, and the `stowage` knows where.

    Attributes:
        dtype: of keys and values as the model makes them.
        dims: sizes of a key and a value.
        count: slots in use; of ragged heads, of the longest.
        rows: where heads are ragged.
        limit: slots that will be used at most, where that is known.
    """

    stowage: Stowage | None = None
    base = 0

    def __init__(self, form: RowFormat | None = None) -> None:
        self.form = form or RowFormat()
        self.dtype = torch.float32
        self.dims = (0, 0)
        self.keys = _NOTHING
        self.values = _NOTHING
        self.count = 0
        self.rows: RaggedRows | None = None
        self.limit: int | None = None
        self._owned = True  # not a model's own tensors, taken in for one forward

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def owned(self) -> bool:
        """Whether keys and values lie in buffers of their own, not in the model's tensors."""
        return self._owned

    @property
    def packed(self) -> bool:
        """Whether keys and values lie in another form than the model's."""
        return self._owned and not self.form.plain

    @property
    def has_layout(self) -> bool:
        """Whether keys and values must be read as `SlotTable.readable` says: heads are ragged, or rows packed."""
        return self.rows is not None or self.packed

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, kv_heads, slots in use, dim]` in the model's type: views, or copies of ragged heads and packed rows."""
        keys, values = self.stored()
        if not self.packed:
            return keys, values
        return self.form.unpack(keys, self.dtype), self.form.unpack(values, self.dtype)

    def views(self) -> tuple[Tensor | PackedRows, Tensor | PackedRows]:
        """As `dense`, without a copy where rows are packed."""
        keys, values = self.stored()
        if not self.packed:
            return keys, values
        return PackedRows(keys, self.form, self.dtype), PackedRows(values, self.form, self.dtype)

    def stored(self) -> tuple[Tensor, Tensor]:
        """As `dense`, in the form in which they are stored."""
        if self.base and self.stowage is not None:
            return self.stowage.gathered(self)
        if self.rows is not None:
            return self.rows.padded(self.keys), self.rows.padded(self.values)
        if self.keys.shape[2] == self.count:
            return self.keys, self.values
        return self.keys[:, :, : self.count], self.values[:, :, : self.count]

    @property
    def capacity(self) -> int:
        """Slots that dense buffers have, those of `base` included."""
        return self.base + self.keys.shape[2]

    def capacity_for(self, slots: int) -> int:
        """Slots that the buffers will have when `slots` are in use."""
        return self.capacity if self._owned and self.capacity >= slots else self._roomy(slots)

    # -- in step with the columns of `SlotTable` -----------------------------------------------------------------------

    def _adopt(self, keys: Tensor, values: Tensor) -> None:
        """The first tokens: the model's own tensors serve until the end of the forward, nothing is copied."""
        self.dtype, self.dims = keys.dtype, (keys.shape[-1], values.shape[-1])
        self.keys, self.values, self._owned = keys, values, False
        self.count = keys.shape[2]

    def _write(self, new: slice, keys: Tensor, values: Tensor) -> None:
        """Put tokens into slots that there is room for."""
        self._write_keys(new, keys)
        self.values[:, :, self._here(new)] = self.form.pack(values)

    def _write_keys(self, new: slice, keys: Tensor) -> None:
        self.keys[:, :, self._here(new)] = self.form.pack(keys)

    def _here(self, new: slice) -> slice:
        """Where slots behind `base` lie in these buffers."""
        return slice(new.start - self.base, new.stop - self.base)

    def _grow(self, capacity: int) -> None:
        """Move to buffers of `capacity` slots."""
        held = self.count - self.base
        self.keys = grown(self._pack(self.keys), held, capacity - self.base)
        self.values = grown(self._pack(self.values), held, capacity - self.base)

    def _take(self, index: Tensor, capacity: int) -> None:
        """Only slots `index [batch, kv_heads, n]` stay, in dense buffers of `capacity` slots."""
        keys, values = self.stored()
        self.keys, self.values = take(keys, index, capacity, self._pack), take(values, index, capacity, self._pack)
        self.rows, self._owned = None, True

    def _take_ragged(self, index: Tensor, rows: RaggedRows) -> None:
        """As `_take`, of each head as many of the slots `index` as `rows` has."""
        keys, values = self.stored()
        self.keys, self.values = rows.flattened(keys, index, self._pack), rows.flattened(values, index, self._pack)
        self.rows, self._owned = rows, True

    def _select(self, index: Tensor, rows: list[int]) -> None:
        """Batch row `i` becomes what row `index[i] = rows[i]` was."""
        if self.rows is None:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
            return
        self.rows, order = self.rows.select_batch(rows, self.keys.device)
        self.keys, self.values = self.keys[order], self.values[order]
        self.count = int(self.rows.capacities.max())  # the longest head may not be among the rows taken

    def _pack(self, rows: Tensor) -> Tensor:
        """Rows that lie here as they are stored in buffers of their own."""
        return rows if self._owned else self.form.pack(rows)

    def _roomy(self, slots: int) -> int:
        """`slots` and some spare ones, but none that would never be filled."""
        roomy = slots + (table_growth(slots) if self.stowage is None else growth(slots))
        return roomy if self.limit is None or self.limit < slots else min(roomy, self.limit)
