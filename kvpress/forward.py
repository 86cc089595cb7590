"""A forward through one layer, and how the attention function finds it."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvpress.errors import CacheStateError
from kvpress.tokens import Tokens

if TYPE_CHECKING:
    from kvpress.decode_step import DecodeStep
    from kvpress.layer import PolicyLayer
    from kvpress.prepared import PreparedSlots

_ATTRIBUTE = "_kvpress_forward"


@dataclass(slots=True, weakref_slot=True)
class Forward:
    """One forward through one layer, from `update` to the end of its attention.

    Attributes:
        layer: whose keys these are.
        rows: tokens, padding included.
        new: slots of the new tokens: a slice, or `[batch, kv_heads, 1]` overwritten ones.
        new_keys: `[batch, kv_heads, rows, dim]` as stored; gone when the forward has ended.
        before: real tokens of each batch row before this forward.
        tokens: set once the mask is known.
        token_ids: `[batch, rows]`, where the policy needs them.
        visible: `[batch, kv_heads, slots]` positions where some slot is empty, `None` where all hold tokens.
        prepared: the slots, where this is a decoded token and attention reads the table with prepared calls. Layers that share these keys
            read them too, when the table may have changed.
        count: of a dense table the slots in use then.
        slots: keys, values and their layout as attention reads them from the table without such calls, `None` where it reads what `update`
            returned.
        weights: `[batch, heads of the keys, slots]` softmax weights of a single row, where the policy asked for them.
        rotated_to: where positions are re-indexed, those to which the model rotated.
    """

    layer: weakref.ref[PolicyLayer]
    rows: int
    new: slice | Tensor
    new_keys: Tensor
    before: tuple[int, ...]
    tokens: Tokens | None = None
    visible: Tensor | None = None
    token_ids: Tensor | None = None
    prepared: PreparedSlots | None = None
    count: int = 0
    slots: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
    rotated_to: Tensor | None = None
    weights: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether its attention has not begun."""
        return self.tokens is None

    @property
    def rotated(self) -> Tensor:
        """Positions `[batch or 1, rows]` to which the model rotated this forward's keys and queries."""
        if self.rotated_to is None:
            raise CacheStateError("the attention of this forward did not run")
        return self.rotated_to

    @property
    def placed(self) -> Tokens:
        """The tokens with their positions.

        Raises:
            CacheStateError: attention did not run.
        """
        if self.tokens is None:
            raise CacheStateError("the attention of this forward did not run")
        return self.tokens


# Models that expand keys between `update` and attention (latents, repeated heads) lose the attribute of the tensor
_latest: ContextVar[weakref.ref[Forward | DecodeStep] | None] = ContextVar("kvpress_forward", default=None)


def hand_over(forward: Forward | DecodeStep, keys: Tensor) -> None:
    """Leave `forward` for the attention function that will get `keys`, or something made of them."""
    setattr(keys, _ATTRIBUTE, forward)
    _latest.set(weakref.ref(forward))


def came_with(keys: Tensor) -> Forward | DecodeStep | None:
    """The forward that was left with just this tensor."""
    forward: Forward | DecodeStep | None = getattr(keys, _ATTRIBUTE, None)
    return forward


def take_over(keys: Tensor, layer_idx: int) -> Forward | DecodeStep | None:
    """The forward left for these keys; `None` when they are not from a `PolicyCache`."""
    forward = came_with(keys)
    if forward is not None:
        return forward
    reference = _latest.get()
    latest = None if reference is None else reference()
    if latest is None or not latest.waits:  # served once
        return None
    layer = latest.layer()
    return latest if layer is not None and layer.layer_idx == layer_idx else None
