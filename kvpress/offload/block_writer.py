"""Writing the blocks of one layer to the tiers: keys and values together, apart, or as slot rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.memory import allocate
from kvpress.offload.key import BlockKey
from kvpress.offload.slot_rows import NAME as SLOT_ROWS
from kvpress.offload.slot_rows import RowLayout
from kvpress.offload.working import StoredBlock, shaped_bytes

if TYPE_CHECKING:
    from kvpress.key_values import KeyValues
    from kvpress.offload.manager import TierManager

NAMES = ("key", "value")
Holding = Callable[[int], AbstractContextManager[None]]


class BlockWriter:
    """Makes blocks of consecutive slots of a layer's table.

    Args:
        owner: name of the cache, to which the blocks belong.
        layer: index of the layer.
        slots: of a block.
        apart: keys and values are written apart, for a selection that reads them at different times.
        together: they are written as slot rows, for a selection that reads single slots: all KV heads of a slot together, or each apart.
    """

    def __init__(self, owner: str, layer: int, slots: int, apart: bool, together: bool | None) -> None:
        self.owner, self.layer, self.slots = owner, layer, slots
        self.apart, self.together = apart, together
        self.serial = 0  # of the blocks written, so that no two share a name

    def copy(self, owner: str) -> BlockWriter:
        """For a copied cache."""
        copied = BlockWriter(owner, self.layer, self.slots, self.apart, self.together)
        copied.serial = self.serial
        return copied

    def layout(self, table: KeyValues) -> RowLayout | None:
        """Of slot rows, where they are written."""
        if self.together is None:
            return None
        return RowLayout.of(stored_like(table, 1), self.slots, together=self.together)

    def put(
        self,
        manager: TierManager,
        table: KeyValues,
        number: int,
        holding: Holding,
    ) -> StoredBlock:
        """Store block `number`, whose slots lie in the table's buffers.

        Args:
            holding: accounts for so many bytes of copies meanwhile.

        Raises:
            TierFullError: no tier has room for it; nothing of it is stored.
        """
        first = number * self.slots - table.base
        packs = 0 if table.owned or table.form.plain else stored_bytes(table, self.slots)
        with holding(packs):
            tensors = {
                name: as_stored(table, whole[:, :, first : first + self.slots])
                for name, whole in zip(NAMES, (table.keys, table.values), strict=True)
            }
            layout = self.layout(table)
            if layout is None:
                return self._put_parts(manager, tensors, number)
            with holding(layout.nbytes(table.keys.shape[0])):
                return self._put_rows(manager, layout, tensors, number)

    def _put_parts(self, manager: TierManager, tensors: dict[str, Tensor], number: int) -> StoredBlock:
        parts: list[tuple[tuple[str, ...], BlockKey]] = []
        for names in (("key",), ("value",)) if self.apart else (NAMES,):
            key = self._key(number, "+".join(names))
            try:
                manager.put(key, {name: tensors[name] for name in names}, self.owner)
            except BaseException:
                manager.drop(self.owner, [each for _, each in parts])
                raise
            parts.append((names, key))
        return StoredBlock(tuple(parts), tensors["key"].shape[0])

    def _put_rows(
        self, manager: TierManager, layout: RowLayout, tensors: dict[str, Tensor], number: int
    ) -> StoredBlock:
        batch, key = tensors["key"].shape[0], self._key(number, SLOT_ROWS)
        rows = allocate(layout.shape(batch), torch.empty(0), torch.uint8)
        layout.pack(tensors, rows, key)
        manager.put(key, {SLOT_ROWS: rows}, self.owner)
        return StoredBlock((((SLOT_ROWS,), key),), batch, layout=layout)

    def _key(self, number: int, context: str) -> BlockKey:
        key = BlockKey(self.owner, self.layer, number, self.serial, context)
        self.serial += 1
        return key


def stored_shapes(
    table: KeyValues, slots: int, batch: int | None = None
) -> tuple[list[tuple[int, ...]], list[torch.dtype]]:
    """Shapes and types of the keys and of the values of `slots` slots, as they are stored; of another number of batch rows than the
    table's where it is given."""
    rows, kv_heads = table.keys.shape[:2]
    stored = [table.form.stored_as(dim, table.dtype) for dim in table.dims]
    return [(batch or rows, kv_heads, slots, size) for size, _ in stored], [dtype for _, dtype in stored]


def stored_bytes(table: KeyValues, slots: int, batch: int | None = None) -> int:
    """Bytes of such keys and values."""
    return shaped_bytes(*stored_shapes(table, slots, batch))


def stored_like(table: KeyValues, slots: int) -> dict[str, Tensor]:
    """Such keys and values by name, without memory."""
    shapes, dtypes = stored_shapes(table, slots)
    return {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, shape, dtype in zip(NAMES, shapes, dtypes, strict=True)
    }


def as_stored(table: KeyValues, rows: Tensor) -> Tensor:
    """Keys or values of `table` as they are stored: the model's own are packed."""
    return rows if table.owned else table.form.pack(rows)
