"""Finding places in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def find_places(
    index: Tensor, place: Tensor, holder: Tensor, used: Tensor, now: int, tail: int, base: int
) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.places.find_places`."""
    if max(int(index.max()) if index.numel() else 0, base + tail - 1) >= place.shape[-1]:
        raise IndexError("index must name slots below the number of slots")
    _put_tail(place, holder, tail, base)
    slot = index.clamp(min=0)
    found = place.gather(-1, slot).long().masked_fill(index < 0, -1)
    row, column, entry = (found >= 0).nonzero(as_tuple=True)
    used[row, column, found[row, column, entry]] = now
    missing = (index >= 0) & (found < 0)
    if bool(missing.any()):
        oldest = used[..., tail:].argsort(dim=-1, stable=True) + tail
        for row, column in missing.any(dim=-1).nonzero().tolist():
            wanted = slot[row, column, missing[row, column]].tolist()
            firsts = sorted(set(wanted), key=wanted.index)  # of a slot listed twice the first entry brings it
            new = torch.tensor(firsts, device=index.device)
            given = oldest[row, column, : len(firsts)]
            old = holder[row, column, given].long()
            place[row, column, old[old >= 0]] = -1
            holder[row, column, given], used[row, column, given] = new.int(), now
            place[row, column, new] = given.int()
            again = torch.tensor([number != wanted.index(each) for number, each in enumerate(wanted)])
            entries = missing[row, column].nonzero().view(-1)
            missing[row, column, entries[again.to(index.device)]] = False
        found = place.gather(-1, slot).long().masked_fill(index < 0, -1)
    return found, missing.view(-1).nonzero().view(-1)


def _put_tail(place: Tensor, holder: Tensor, tail: int, base: int) -> None:
    """The first `tail` rows hold the slots from `base` on, and these lie nowhere else."""
    rows = torch.arange(tail, device=place.device, dtype=torch.int32)
    slots = rows + base
    own = holder[..., :tail] == slots
    for row, column, number in (holder[..., :tail] >= 0).logical_and(~own).nonzero().tolist():
        place[row, column, int(holder[row, column, number])] = -1
    holder.masked_fill_((holder >= base) & (holder < base + tail), -1)
    holder[..., :tail] = slots
    place[..., base : base + tail] = rows
