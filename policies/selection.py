"""What every selection policy is: all tokens stay, and a few are attended to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Final

from torch import Tensor

from kvpress.kernels.choosing import best_slots as best_of_rows
from kvpress.policies.base import Policy
from kvpress.rope import Rotation
from kvpress.tensor_parallel import ALONE, HeadShards

if TYPE_CHECKING:
    from kvpress.kernels.choosing.prepared import PreparedVote
    from kvpress.kernels.pages.prepared import PreparedPages


class Every(Enum):
    """Every slot, in place of a list."""

    SLOT = 0


ALL: Final = Every.SLOT


def best_slots(scores: Tensor, count: int, positions: Tensor | None = None) -> Tensor:
    """The `count` slots of highest score, ascending: `[…, count]` of scores `[…, slots]`; of equal ones the later token is chosen.

    Args:
        scores: without NaN; fewer than `count` slots are all returned.
        positions: like `scores`, where slots are in no order; the result then ascends by position.
    """
    order = None
    if positions is not None:
        order = positions.expand_as(scores).argsort(dim=-1)
        scores = scores.gather(-1, order)
    chosen = best_of_rows(scores, count)
    return chosen if order is None else order.gather(-1, chosen)


@dataclass(slots=True)
class SlotView:
    """What a selector sees when some query rows are about to attend.

    Attributes:
        query: `[batch, query_heads, rows, dim]`: rotated, or before rotation where positions are re-indexed.
        keys: `[batch, kv_heads, slots, dim]` likewise. With offload it may be a stand-in (`kvpress.offload.stored_slots.StoredSlots`)
            that has a shape and a device, and reads `keys[:, :, first:last]` from the tiers: ask for no more than is needed.
        positions: `[batch, kv_heads, slots]` int32, `-1` for an empty slot.
        newest: position of the last of these rows: an int when all batch rows are alike, else `[batch, 1, 1]`.
        scaling: factor of the dot products in attention.
        ordered: slots ascend by position, from 0, none is empty.
        ascending: slots ascend by position, empty ones first.
        decoding: a single token after a prompt.
        new: slots of this forward's tokens: a slice, or `[batch, kv_heads, 1]`.
        shared: one kept set for all KV heads, so that one index may serve them all.
        rotation: where positions are re-indexed.
        heads: the share of the model's heads that these are.
    """

    query: Tensor
    keys: Any
    positions: Tensor
    newest: int | Tensor
    scaling: float
    ordered: bool
    ascending: bool
    decoding: bool
    new: slice | Tensor
    shared: bool
    rotation: Rotation | None = None
    heads: HeadShards = ALONE

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return int(self.keys.shape[2])

    @property
    def buffer(self) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
        """Keys `[batch, kv_heads, room, dim]` with all that there is room for, those of the slots first, and scales `[batch, kv_heads,
        room]` of int8 ones, where this memory stays what it is from one token to the next."""
        return None, None


class Selector:
    """The selection of one layer of one cache: a policy's state. Subclasses hold what they must, and follow the cache's verbs."""

    hits = 0  # decode steps that reused an earlier selection
    misses = 0  # selections made
    has_index = False  # chooses by tensors of its own: old keys are read only where they are selected
    complete_lists = False  # where slots are ordered, its lists of a decoded token ascend and have no -1
    tells_at_once = False  # `at_once` may answer
    one_set = False  # one set serves all KV heads, where they keep the same tokens

    def select(self, view: SlotView) -> Tensor | None:
        """Slots to attend to, `[batch, kv_heads or 1, n]` int64 with `-1` for none; `None` for all."""
        raise NotImplementedError

    def at_once(self, query: Tensor, slots: int) -> PreparedVote | PreparedPages | Tensor | Every | None:
        """What a decoded token attends to, where that can be told without a look at the slots: a call that lists them (and will be made;
        `called` tells that it was), a list, or `ALL`. `None`: ask `select`.

        Args:
            query: `[batch, query_heads, 1, dim]`, as of `SlotView`; where positions are re-indexed its numbers are still to come.
            slots: in use, in order, the token's own with them.
        """
        return None

    def called(self, anew: bool) -> None:
        """The call that `at_once` gave was made; whether it chose anew."""

    def narrows(self, slots: int) -> bool:
        """Whether a decoded token that sees `slots` slots surely reads only some of them. With offload the others are then left where they
        are, and `select` sees a stand-in for the keys; the default reads everything."""
        return False

    def select_batch(self, index: Tensor) -> None:
        """Row `i` becomes what row `index[i]` was."""

    def rearrange(self) -> None:
        """Slots were moved, evicted in bulk, or taken back: what is known of them by slot is void."""

    def vacate(self) -> None:
        """Some tokens were evicted, the others stay in their slots. (A token that replaces another comes with the next view.)"""

    def crop(self, slots: int) -> None:
        """The last tokens were taken back, `slots` slots are left; no other slot was moved."""
        self.rearrange()

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return []

    def bytes_to_grow(self, keys: Any) -> int:
        """Bytes that `select` holds at most beside those held now when it sees `keys`, so that room for them can be made."""
        return 0

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal selector: numbers and tensors."""
        return {"hits": self.hits, "misses": self.misses}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.hits, self.misses = state["hits"], state["misses"]


@dataclass(frozen=True)
class SelectionPolicy(Policy):
    """Decides what is attended to."""

    kind: ClassVar[str] = "selection"
    same_slots_in_all_layers: ClassVar[bool] = False  # layers use slots that another layer chose
    selects_for_prompts: ClassVar[bool] = False  # not only for decoded tokens
    selects_for_all_heads: ClassVar[bool] = (
        False  # KV heads choose together: tensor parallelism must bring them together
    )

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
