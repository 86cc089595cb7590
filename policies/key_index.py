"""KeyIndex: the keys of one layer's slots as int8 or int4, kept beside the slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.packing import SCALE_BYTES, pack_int4, pack_int8
from kvpress.kernels.packing.int4 import CODES_A_BYTE
from kvpress.memory import filled, growth
from kvpress.policies.selection import SlotView
from kvpress.row_format import Int8Rows

_FORM = Int8Rows()
PIECE = 1024  # slots that are rounded at once, so that no second copy of all keys is made
FIRST = 256  # tokens whose keys make the centre of their head


def quantise(keys: Tensor, form: str, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`keys [..., dim]` as codes and a fp32 scale `[...]` each (`kvpress.kernels.packing`); int4 ones less `centre`."""
    return _FORM.parts(pack_int8(keys) if form == "int8" else pack_int4(keys, centre))


def centre_of(keys: Any, tokens: Tensor) -> Tensor:
    """The mean `[batch, kv_heads, dim]` in fp32 of those of the keys `[batch, kv_heads, slots, dim]` that `tokens [batch, kv_heads, slots]`
    names, numbers that are not finite counting as 0; 0 where it names none."""
    total = torch.zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float64, device=keys.device)
    for first in range(0, keys.shape[2], PIECE):
        named = tokens[:, :, first : first + PIECE, None]
        if bool(named.any()):
            piece = keys[:, :, first : first + PIECE]
            total += piece.double().where(named & piece.isfinite(), 0.0).sum(dim=2)
    return (total / tokens.sum(dim=2).clamp(min=1)[..., None]).float()


def _first_tokens(view: SlotView) -> tuple[Tensor, Tensor]:
    """Which slots hold the tokens of a centre, `[batch, kv_heads, slots]`, and which heads have all of them, `[batch, kv_heads]`."""
    first = (view.positions >= 0) & (view.positions < FIRST)
    whole = first.sum(dim=2) == FIRST
    return first & whole[..., None], whole


def _codes(form: str, dim: int) -> int:
    """Elements that the codes of a key take."""
    return dim if form == "int8" else dim // CODES_A_BYTE


class KeyIndex:
    """Rounded keys and their scales, by slot. What a key is rounded to depends on that key alone, and for int4 on the centre, so it does
    not matter when it is done.

    A constant taken off all keys of a head changes no softmax over them, and what is left has a smaller range: int4 keys are rounded less
    the mean key of the first `FIRST` tokens of their batch row, once it has so many. Until then there is none, and then all keys are
    rounded anew, so that a row is chosen from as if it were alone.

    Attributes:
        form: `"int8"` or `"int4"`.
        codes: `[batch, kv_heads, capacity, dim]` int8, or `[batch, kv_heads, capacity, dim / 2]` uint8, two int4 a byte.
        scales: `[batch, kv_heads, capacity]` fp32.
        centre: `[batch, kv_heads, dim]` fp32 of int4 keys, 0 where there is none.
        centred: `[batch, kv_heads]` bool: where there is one.
        settled: no centre is to come.
        covered: slots whose keys are in it.
        steady: tokens took the places of others since it was begun.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.codes: Tensor | None = None
        self.scales: Tensor | None = None
        self.centre: Tensor | None = None
        self.centred: Tensor | None = None
        self.settled = self.form == "int8"
        self.covered = 0
        self.steady = False

    def follow(self, view: SlotView) -> None:
        """Take in the keys of `view` that are not in it yet. Slots that were moved must have been told of by `clear`."""
        slots, overwrites = view.slots, isinstance(view.new, Tensor)
        moved = slots != self.covered if overwrites else (self.steady or slots < self.covered)
        if self.codes is None or moved or not self._is_centred(view):
            self.clear()
            if self.form == "int4":
                first, self.centred = _first_tokens(view)
                self.centre, self.settled = centre_of(view.keys, first), bool(self.centred.all())
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
        self.settled = self.form == "int8"  # tokens of the centre may be gone

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Codes of keys `[batch, kv_heads, last - first, …]` and their scales."""
        if self.codes is None or self.scales is None:
            raise RuntimeError("the index holds no keys")
        return self.codes[:, :, first:last], self.scales[:, :, first:last]

    def select_batch(self, index: Tensor) -> None:
        """Row `i` becomes what row `index[i]` was."""
        if self.codes is not None and self.scales is not None:
            rows = index.to(self.codes.device)
            self.codes, self.scales = self.codes[rows], self.scales[rows]
            if self.centre is not None and self.centred is not None:
                self.centre, self.centred = self.centre[rows], self.centred[rows]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [tensor for tensor in (self.codes, self.scales, self.centre, self.centred) if tensor is not None]

    def bytes_to_grow(self, keys: Any) -> int:
        """Bytes beside those held while `follow` takes in `keys`: of new buffers, while the old ones are still there."""
        batch, heads, slots, dim = keys.shape
        if self.codes is not None and self.codes.shape[2] >= slots:
            return 0
        row = _codes(self.form, dim) + SCALE_BYTES
        centre = dim * torch.float32.itemsize + 1 if self.form == "int4" and self.centre is None else 0
        fresh: int = batch * heads * ((slots + growth(slots)) * row + centre)
        return fresh

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal index."""
        if self.codes is None or self.scales is None:
            return {}
        codes, scales = self.read(0, self.covered)
        names = () if self.form == "int8" else ("centre", "centred", "settled")
        centre = {name: getattr(self, name) for name in names}
        return {"codes": codes, "scales": scales, "steady": self.steady, **centre}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.clear()
        if state:
            self.codes, self.scales, self.steady = state["codes"], state["scales"], state["steady"]
            if self.form == "int4":
                self.centre, self.centred, self.settled = state["centre"], state["centred"], state["settled"]
            self.covered = self.codes.shape[2]

    def _is_centred(self, view: SlotView) -> bool:
        """Whether centres are known where they can be."""
        if self.settled or self.centred is None:
            return self.settled
        centred = _first_tokens(view)[1]
        self.settled = bool(centred.all())
        return torch.equal(centred, self.centred)

    def _extend(self, keys: Any, slots: int) -> None:
        batch, heads, _, dim = keys.shape
        if self.codes is None or self.scales is None or self.codes.shape[2] < slots:
            capacity = slots + growth(slots)
            kind = torch.int8 if self.form == "int8" else torch.uint8
            self.codes = self._grown(self.codes, (batch, heads, capacity, _codes(self.form, dim)), keys, kind)
            self.scales = self._grown(self.scales, (batch, heads, capacity), keys, torch.float32)
        for first in range(self.covered, slots, PIECE):
            last = min(first + PIECE, slots)
            piece = keys[:, :, first:last]
            self.codes[:, :, first:last], self.scales[:, :, first:last] = quantise(piece, self.form, self.centre)
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
        row = slot[..., None]
        key = keys.gather(2, row.expand(-1, -1, -1, keys.shape[-1]))
        codes, scales = quantise(key, self.form, self.centre)
        self.codes.scatter_(2, row.expand_as(codes), codes)
        self.scales.scatter_(2, slot, scales)
