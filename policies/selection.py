"""What every selection policy is: all tokens stay, and a few are attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvpress.policies.base import Policy
from kvpress.rope import Rotation


@dataclass
class SlotView:
    """What a selector sees when some query rows are about to attend.

    Attributes:
        query: `[batch, query_heads, rows, dim]`: rotated, or before rotation where positions are re-indexed.
        keys: `[batch, kv_heads, slots, dim]` likewise.
        positions: `[batch, kv_heads, slots]` int32, `-1` for an empty slot.
        newest: position of the last of these rows: an int when all batch rows are alike, else `[batch, 1, 1]`.
        scaling: factor of the dot products in attention.
        ordered: slots ascend by position, from 0, none is empty.
        decoding: a single token after a prompt.
        new: slots of this forward's tokens: a slice, or `[batch, kv_heads, 1]`.
        shared: one kept set for all KV heads, so that one index may serve them all.
        rotation: where positions are re-indexed.
    """

    query: Tensor
    keys: Tensor
    positions: Tensor
    newest: int | Tensor
    scaling: float
    ordered: bool
    decoding: bool
    new: slice | Tensor
    shared: bool
    rotation: Rotation | None = None


class Selector:
    """The selection of one layer of one cache: a policy's state. Subclasses hold what they must, and follow the cache's verbs."""

    hits = 0  # decode steps that reused an earlier selection
    misses = 0  # selections made

    def select(self, view: SlotView) -> Tensor | None:
        """Slots to attend to, `[batch, kv_heads or 1, n]` int64 with `-1` for none; `None` for all."""
        raise NotImplementedError

    def select_batch(self, index: Tensor) -> None:
        """Row `i` becomes what row `index[i]` was."""

    def rearrange(self) -> None:
        """Slots were moved, evicted in bulk, or taken back: what is known of them by slot is void."""


@dataclass(frozen=True)
class SelectionPolicy(Policy):
    """Decides what is attended to. Attributes say how a prompt is cut before its rows select."""

    kind: ClassVar[str] = "selection"
    same_slots_in_all_layers: ClassVar[bool] = False  # layers use slots that another layer chose

    @property
    def reindexes(self) -> bool:
        """Attention runs over positions 0 … n-1 of what is selected."""
        return False

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """Rows of a forward of `rows` tokens that select together: `(first, past the last)`; by default all."""
        return [(0, rows)]

    def selector(self, layer: int, ordinal: int, layers: int, shared: dict[str, Any]) -> Selector:
        """A new selector for a layer.

        Args:
            layer: index in the model.
            ordinal, layers: index among the compressed layers, and their number.
            shared: the same dictionary for all layers of a cache.
        """
        raise NotImplementedError
