"""Slots that stay where they are while tokens are decoded: what is the same for every token is looked up once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.kernels.attention.steady import SteadyAttention
from kvpress.kernels.eviction import RowWriter
from kvpress.kernels.eviction.steady import SteadyWeakest

if TYPE_CHECKING:
    from kvpress.slots import SlotTable

POSITION = "position"


@functools.cache
def _no_score(device: torch.device) -> Tensor:
    """What a new token starts with, made once a device: a copy at every token would wait for it."""
    return torch.zeros(1, 1, device=device)


class SteadySlots:
    """Writes a token into the buffers of a steady `table`, and attends to them. It is void when the buffers are others.

    Attributes:
        readable: as `SlotTable.readable`.
        attention: over all slots of the table.
        weakest: finds the slot to evict of each head.
    """

    def __init__(self, table: SlotTable) -> None:
        batch, kv_heads = table.columns[POSITION].shape[:2]
        starts = None if table.rows is None else table.rows.starts
        columns = [table.columns[name] for name in table.column_names]
        self._form = table.form
        self._rows = RowWriter([table.keys, table.values], (batch, kv_heads), starts)
        self._columns = RowWriter(columns, (batch, kv_heads))
        self._position = RowWriter([table.columns[POSITION]], (batch, kv_heads))
        self._scores = len(columns)
        self.readable = table.read()
        self.attention = SteadyAttention(*self.readable)
        self.weakest = SteadyWeakest(table.positions, None if table.rows is None else table.rows.lengths)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of a copied table there is none yet: addresses are those of the original."""

    def overwrite(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put a token `[batch, kv_heads, 1, dim]` in `slot [batch, kv_heads, 1]`, with scores of 0."""
        self._rows.write(slot, [self._form.pack(keys), self._form.pack(values)])
        if self._scores:
            self._columns.write(slot, [_no_score(slot.device)] * self._scores)

    def write_keys(self, slot: Tensor, keys: Tensor) -> None:
        """Put `keys [batch, kv_heads, 1, dim]` there."""
        self._rows.write(slot, [self._form.pack(keys)])

    def place(self, slot: Tensor, positions: Tensor) -> None:
        """Put `positions [batch or 1, 1]` int32 there."""
        self._position.write(slot, [positions])

    def tensors(self) -> Iterator[Tensor]:
        """What is held beside the table's tensors."""
        for writer in (self._rows, self._columns, self._position):
            yield from writer.tensors()
