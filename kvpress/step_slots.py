"""Where the slots of a decode step lie."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpress.columns import POSITION
from kvpress.kernels.decode_step import PreparedStep

if TYPE_CHECKING:
    from array import array

    from kvpress.kernels.attention.prepared import PreparedAttention
    from kvpress.kernels.decode_step import PreparedEviction
    from kvpress.kernels.rotation.prepared import PreparedRotation
    from kvpress.prepared import PreparedSlots
    from kvpress.slots import SlotTable


class StepSlots:
    """All slots of a growing table in its own buffers, while these stay. Subclasses speak of near copies, with offload, and of steady
    tables. None of the memory is held.

    Args:
        table: a token of which was just attended to by the calls `prepared`.

    Attributes:
        eviction: what comes after attention, where a token takes the place of another.
    """

    eviction: PreparedEviction | None = None

    def __init__(self, table: SlotTable, prepared: PreparedSlots) -> None:
        self._room = min(table.capacity, table.columns[POSITION].shape[2])
        self._prepared = weakref.ref(prepared)

    @classmethod
    def of(cls, table: SlotTable) -> StepSlots | None:
        """Those of `table`, if they lie so."""
        prepared = table.prepared
        return None if prepared is None or table.spare is not None else cls(table, prepared)

    def attention(self, table: SlotTable) -> PreparedAttention | None:
        """What attended to them."""
        return None if table.prepared is None else table.prepared.attention

    def prepare(
        self, table: SlotTable, query: Tensor, keys: Tensor, values: Tensor, back: PreparedRotation | None
    ) -> PreparedStep | None:
        """The kernels of tokens like that of `query`, `keys` and `values`; `None` where the compiled ones do not serve."""
        attention, buffers = self.attention(table), (table.keys, table.values)
        if table.packed:
            keys, values = table.form.pack(keys), table.form.pack(values)
        if attention is None or PreparedStep.refusal(query, keys, values, buffers, attention) is not None:
            return None
        return PreparedStep(query, keys, values, buffers, attention, back, stored=table.packed, eviction=self.eviction)

    def foresee(self, table: SlotTable) -> None:
        """Of tokens in order positions are known beforehand."""
        positions = table.columns.stored(POSITION)
        positions[:, :, table.count :] = torch.arange(table.count, positions.shape[2], dtype=positions.dtype)

    def stay(self, table: SlotTable) -> bool:
        """Whether they lie as they did, with room for one more."""
        return table.count < self._room and self._prepared() is table.prepared

    def place(self, table: SlotTable) -> tuple[int, int]:
        """The slot of its buffers that the next token takes, and how many slots attention reads from then (0: as many as ever)."""
        return table.count, table.count + 1

    def advance(self, table: SlotTable) -> None:
        """A token went there."""
        table.advance()

    def places(self, table: SlotTable, index: Tensor) -> array[int] | None:
        """The call that looks up where the slots `index` lie and writes it to `found`; `None` where they lie in their own places."""
        return None

    @property
    def found(self) -> Tensor | None:
        """What the call of `places` writes."""
        return None

    def bring(self, table: SlotTable, index: Tensor) -> None:
        """Bring those of `index` that the last call found nowhere to where it says that they lie."""

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return []
