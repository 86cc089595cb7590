"""TableView: what a selector sees of a table whose buffers stay where they are, cut out of them only when it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpress.policies.selection import SlotView

if TYPE_CHECKING:
    from kvpress.forward import Forward
    from kvpress.reading import Reader
    from kvpress.slots import SlotTable


class TableView(SlotView):
    """The slots of `table` as the decoded token of `forward` sees them. `keys` and `positions` are made when they are first asked for: a
    cut of a tensor costs more than all the numbers here.

    Args:
        query, scaling, ordered: as of `SlotView`.
        reader: whose selector is asked.
    """

    __slots__ = ("table",)

    def __init__(
        self, table: SlotTable, forward: Forward, query: Tensor, scaling: float, ordered: bool, reader: Reader
    ) -> None:
        self.table = table
        self.query = query
        self.newest = forward.placed.newest
        self.scaling = scaling
        self.ordered = ordered
        self.new = forward.new
        self.ascending = isinstance(forward.new, slice)
        self.decoding = True
        self.shared = reader.shared
        self.rotation = reader.rotation
        self.heads = reader.heads

    def __getattr__(self, name: str) -> Any:
        if name == "keys":
            self.keys = self.table.views()[0]
        elif name == "positions":
            self.positions = self.table.positions
        else:
            raise AttributeError(name)
        return getattr(self, name)

    @property
    def slots(self) -> int:
        return self.table.count

    @property
    def buffer(self) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
        prepared = self.table.prepared
        if prepared is None or self.table.rows is not None:
            return None, None
        keys, _, layout = prepared.whole
        return keys, layout.get("keys_scale")
