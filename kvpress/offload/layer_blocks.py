"""The blocks of one layer: consecutive slots from the first on, which never change once they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.memory import allocate
from kvpress.offload.attached import Attached
from kvpress.offload.block_writer import BlockWriter, Holding, stored_bytes, stored_like
from kvpress.offload.errors import TierClosedError
from kvpress.offload.working import Reading, StoredBlock, read_all

if TYPE_CHECKING:
    from kvpress.key_values import KeyValues


class LayerBlocks:
    """Which blocks of a layer the tiers hold, and how they are read.

    Args:
        attached: the tiers.
        writer: makes the blocks.

    Attributes:
        listed: the blocks, in order, `size` slots each.
    """

    def __init__(self, attached: Attached, writer: BlockWriter) -> None:
        self.attached, self.writer = attached, writer
        self.size = attached.options.block
        self.listed: list[StoredBlock] = []

    @property
    def slots(self) -> int:
        """Slots that lie in blocks."""
        return len(self.listed) * self.size

    def copy(self, attached: Attached) -> LayerBlocks:
        """For a copied cache, which relies on the same blocks."""
        copied = LayerBlocks(attached, self.writer.copy(attached.name))
        copied.listed = list(self.listed)
        return copied

    def put(self, table: KeyValues, holding: Holding) -> None:
        """Write blocks until too few slots for another are left behind them.

        Args:
            holding: as of `BlockWriter.put`.

        Raises:
            TierFullError: no tier has room for a block; those before it are written.
        """
        while self.slots + self.size <= table.count:
            self.listed.append(self.writer.put(self.attached.manager, table, len(self.listed), holding))

    def drop_from(self, first: int) -> None:
        """Forget block `first` and all behind it."""
        gone, self.listed = self.listed[first:], self.listed[:first]
        if gone:
            with suppress(TierClosedError):
                self.attached.manager.drop(self.attached.name, [key for block in gone for key in block.keys])

    def select_batch(self, rows: Sequence[int]) -> None:
        """Batch row `i` becomes what row `rows[i]` was."""
        self.listed = [block.selected(rows) for block in self.listed]

    def readings(self, out: dict[str, Tensor], first: int = 0, last: int | None = None) -> list[Reading]:
        """What to read to fill the tensors of `out [batch, kv_heads, slots, dim]`, by name, from block `first` to the one before `last`."""
        readings = []
        for number, block in enumerate(self.listed[first:last]):
            slots = slice(number * self.size, (number + 1) * self.size)
            readings += block.readings({name: tensor[:, :, slots] for name, tensor in out.items()})
        return readings

    def read(self, table: KeyValues, out: dict[str, Tensor], first: int = 0, last: int | None = None) -> None:
        """Read them through a buffer of its own, which is not accounted for.

        Raises:
            TierError: a block is lost or cannot be read.
        """
        staging = allocate((self.block_bytes(table),), torch.empty(0), torch.uint8)
        read_all(self.attached.manager, self.readings(out, first, last), staging)

    def block_bytes(self, table: KeyValues) -> int:
        """Of one block on its way, with the most batch rows that any has."""
        batch = max((block.batch for block in self.listed), default=1)
        layout = self.writer.layout(table)
        return stored_bytes(table, self.size, batch) if layout is None else layout.nbytes(batch)

    def tensors(
        self, table: KeyValues, block: StoredBlock, names: Sequence[str], staging: Callable[[], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors `names` of a block as they were written; valid until the next is asked for.

        Args:
            staging: asked for a flat buffer for one block where it is read whole.

        Raises:
            TierError: it is lost or cannot be read.
        """
        manager = self.attached.manager
        like = stored_like(table, self.size)
        for reading in block.readings({name: like[name] for name in names}):
            # bringing it near would cost another block its place
            if block.layout is not None or not manager.is_near(reading.key):
                found = reading.staged(manager, staging())
                yield from ((name, found[name]) for name in reading.out if name in names)
                continue
            with manager.use([reading.key]) as held:
                yield from ((name, held[0][name]) for name in reading.out if name in names)
