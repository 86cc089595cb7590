"""KeyIndex: the keys of one layer's slots as int8, kept beside the slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.memory import filled, growth
from kvpress.policies.selection import SlotView
from kvpress.row_format import Int8Rows

_FORM = Int8Rows()
PIECE = 1024  # slots that are rounded at once, so that no second copy of all keys is made


def quantise(keys: Tensor) -> tuple[Tensor, Tensor]:
    """`keys [..., dim]` as int8 and a fp32 scale `[...]` each: `codes * scale` is at most half a scale away from every number."""
    return _FORM.parts(_FORM.pack(keys))


class KeyIndex:
    """int8 keys and their scales, by slot. What a key is rounded to depends on that key alone, so it does not matter when it is done.

    Attributes:
        codes: `[batch, kv_heads, capacity, dim]` int8.
        scales: `[batch, kv_heads, capacity]` fp32.
        covered: slots whose keys are in it.
        steady: tokens took the places of others since it was begun.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.codes: Tensor | None = None
        self.scales: Tensor | None = None
        self.covered = 0
        self.steady = False

    def follow(self, view: SlotView) -> None:
        """Take in the keys of `view` that are not in it yet. Slots that were moved must have been told of by `clear`."""
        slots, overwrites = view.keys.shape[2], isinstance(view.new, Tensor)
        moved = slots != self.covered if overwrites else (self.steady or slots < self.covered)
        if self.codes is None or moved:
            self.clear()
            self._extend(view.keys, slots)
        elif isinstance(view.new, Tensor):
            self._overwrite(view.keys, view.new)
        else:
            self._extend(view.keys, slots)
        self.steady = overwrites

    def crop(self, slots: int) -> None:
        """The last slots are gone, `slots` are left."""
        if self.steady:
            self.clear()
        self.covered = min(self.covered, slots)

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys `[batch, kv_heads, last - first, dim]` and their scales."""
        if self.codes is None or self.scales is None:
            raise RuntimeError("the index holds no keys")
        return self.codes[:, :, first:last], self.scales[:, :, first:last]

    def select_batch(self, index: Tensor) -> None:
        """Row `i` becomes what row `index[i]` was."""
        if self.codes is not None and self.scales is not None:
            rows = index.to(self.codes.device)
            self.codes, self.scales = self.codes[rows], self.scales[rows]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [tensor for tensor in (self.codes, self.scales) if tensor is not None]

    def bytes_to_grow(self, keys: Any) -> int:
        """Bytes beside those held while `follow` takes in `keys`: of new buffers, while the old ones are still there."""
        batch, heads, slots, dim = keys.shape
        if self.codes is not None and self.codes.shape[2] >= slots:
            return 0
        fresh: int = batch * heads * (slots + growth(slots)) * (dim + torch.float32.itemsize)
        return fresh

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal index."""
        if self.codes is None or self.scales is None:
            return {}
        codes, scales = self.read(0, self.covered)
        return {"codes": codes, "scales": scales, "steady": self.steady}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.clear()
        if state:
            self.codes, self.scales, self.steady = state["codes"], state["scales"], state["steady"]
            self.covered = self.codes.shape[2]

    def _extend(self, keys: Any, slots: int) -> None:
        batch, heads, _, dim = keys.shape
        if self.codes is None or self.scales is None or self.codes.shape[2] < slots:
            capacity = slots + growth(slots)
            self.codes = self._grown(self.codes, (batch, heads, capacity, dim), keys, torch.int8)
            self.scales = self._grown(self.scales, (batch, heads, capacity), keys, torch.float32)
        for first in range(self.covered, slots, PIECE):
            last = min(first + PIECE, slots)
            self.codes[:, :, first:last], self.scales[:, :, first:last] = quantise(keys[:, :, first:last])
        self.covered = slots

    def _grown(self, old: Tensor | None, shape: tuple[int, ...], keys: Any, dtype: torch.dtype) -> Tensor:
        fresh = filled(shape, 0, torch.empty(0, device=keys.device), dtype)
        if old is not None:
            fresh[:, :, : self.covered] = old[:, :, : self.covered]
        return fresh

    def _overwrite(self, keys: Tensor, new: Tensor) -> None:
        if self.codes is None or self.scales is None:
            raise RuntimeError("the index holds no keys")
        slot = new.expand(*keys.shape[:2], 1)
        rows = slot[..., None].expand(-1, -1, -1, keys.shape[-1])
        codes, scales = quantise(keys.gather(2, rows))
        self.codes.scatter_(2, rows, codes)
        self.scales.scatter_(2, slot, scales)
