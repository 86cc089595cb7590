"""WaitingForward: a forward whose end waits until it is known how many of its tokens stay."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kvpress.forward import Forward
from kvpress.observation import AttentionArguments
from kvpress.tokens import Tokens

if TYPE_CHECKING:
    from kvpress.slots import SlotTable


class WaitingForward(NamedTuple):
    """What `Keeper.keep` takes.

    Attributes:
        forward: attended to, not yet observed.
        query: `[batch, query_heads, rows, dim]`, `None` where nobody asked for queries.
        keys: `[batch, heads, slots, dim]` as attention saw them.
        arguments: of that attention.
    """

    forward: Forward
    query: Tensor | None
    keys: Tensor
    arguments: AttentionArguments

    def without(self, removed: int, seen: tuple[int, ...], table: SlotTable) -> WaitingForward:
        """As if its last `removed` tokens had never come, which `table` has dropped; `seen` real tokens of each batch row are left."""
        if not removed:
            return self
        forward, tokens = self.forward, self.forward.placed
        left = forward.rows - removed
        counts = tuple(now - past for now, past in zip(seen, forward.before, strict=True))
        shorter = dataclasses.replace(
            forward,
            rows=left,
            new=slice(table.count - left, table.count),
            new_keys=forward.new_keys[:, :, :left],
            tokens=Tokens(left, counts, seen, tokens.positions[:, :left], tokens.newest - removed),
            visible=None if forward.visible is None else table.positions,
            token_ids=None if forward.token_ids is None else forward.token_ids[:, :left],
        )
        query = None if self.query is None else self.query[:, :, :left]
        return WaitingForward(shorter, query, self.keys[:, :, : table.count], self.arguments)
