"""Slots whose memory stays where it is while tokens are decoded: what is the same for every token is looked up once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.columns import POSITION
from kvpress.kernels.attention.prepared import PreparedAttention
from kvpress.kernels.eviction import RowWriter
from kvpress.kernels.eviction.steady import SteadyWeakest

if TYPE_CHECKING:
    from kvpress.slots import SlotTable


@functools.cache
def _no_score(device: torch.device) -> Tensor:
    """What a new token starts with, made once a device: a copy at every token would wait for it."""
    return torch.zeros(1, 1, device=device)


class PreparedSlots:
    """Writes a token into the buffers of a `table`, and attends to them. It is void when the buffers are others.

    Attributes:
        whole: keys, values and their layout as `SlotTable.readable` gives them, with all that there is room for.
        attention: over slots of the table.
        weakest: finds the slot to evict of each head, in a steady table.
    """

    def __init__(self, table: SlotTable) -> None:
        batch, kv_heads = table.columns[POSITION].shape[:2]
        positions = table.columns.stored(POSITION)
        starts = None if table.rows is None else table.rows.starts
        columns = [table.columns[name] for name in table.column_names]
        self._form = table.form
        self._dtypes = table.keys.dtype, table.values.dtype
        self._rows = RowWriter([table.keys, table.values], (batch, kv_heads), starts)
        self._columns = RowWriter(columns, (batch, kv_heads))
        self._position = RowWriter([positions], (batch, positions.shape[1]))
        self._scores = len(columns)
        layout = {} if table.rows is None else {"starts": table.rows.starts, "lengths": table.rows.lengths}
        self.whole = table.form.readable(table.keys, table.values, layout)
        self.attention = PreparedAttention(*self.whole)
        self.weakest = SteadyWeakest(table.columns[POSITION], None if table.rows is None else table.rows.lengths)
        self._device = positions.device

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of a copied table there is none yet: addresses are those of the original."""

    def overwrite(self, slot: Tensor | int, keys: Tensor, values: Tensor) -> None:
        """Put a token `[batch, kv_heads, 1, dim]` in `slot [batch, kv_heads, 1]`, or one for all heads, with scores of 0."""
        keys_dtype, values_dtype = self._dtypes
        self._rows.write(slot, [self._stored(keys, keys_dtype), self._stored(values, values_dtype)])
        if self._scores:
            self._columns.write(slot, [_no_score(self._device)] * self._scores)

    def write_keys(self, slot: Tensor | int, keys: Tensor) -> None:
        """Put `keys [batch, kv_heads, 1, dim]` there."""
        self._rows.write(slot, [self._stored(keys, self._dtypes[0])])

    def _stored(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as the buffers hold them, also where `torch.autocast` was switched on or off since the first ones."""
        stored = self._form.pack(rows)
        return stored if stored.dtype == dtype else stored.to(dtype)

    def place(self, slot: Tensor | int, positions: Tensor) -> None:
        """Put `positions [batch or 1, 1]` int32 there."""
        self._position.write(slot, [positions])

    def tensors(self) -> Iterator[Tensor]:
        """What is held beside the table's tensors."""
        for writer in (self._rows, self._columns, self._position):
            yield from writer.tensors()
