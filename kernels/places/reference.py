"""Places and rows in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

USE = 1 << 24


def find_places(
    index: Tensor, place: Tensor, holder: Tensor, uses: Tensor, tail: int, base: int, vacant: int
) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.places.find_places`."""
    if max(int(index.max()) if index.numel() else 0, base + tail - 1) >= place.shape[-1]:
        raise IndexError("index must name slots below the number of slots")
    _put_tail(place, holder, tail, base, vacant)
    missing = (index >= 0) & (place.gather(-1, index.clamp(min=0)) < 0)
    for row, column in missing.any(dim=-1).nonzero().tolist():
        state = place[row, column], holder[row, column], uses[row, column]
        missing[row, column] = _bring(index[row, column], missing[row, column], *state, tail + vacant)
    found = place.gather(-1, index.clamp(min=0)).long().masked_fill(index < 0, -1)
    return found, missing.view(-1).nonzero().view(-1)


def rows_to_read(
    entries: Tensor, index: Tensor, places: Tensor, rows: int, block: int, blocks: int, then: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kvpress.kernels.places.rows_to_read`."""
    groups, count = index.shape[1:]
    if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) < index.numel():
        raise IndexError("index must name slots below the number of slots")
    slots = index.view(-1)[entries]
    if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < block * blocks:
        raise IndexError("index must name slots below the number of slots")
    row, group, number = entries // (groups * count), entries // count % groups, slots // block
    before = row if then is None else then[number, row]
    inside = (before * groups + group) * block + slots % block
    order = (number * (1 << 32) + inside).argsort()
    found, counts = number[order].unique_consecutive(return_counts=True)
    firsts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return found, firsts, inside[order], ((row * groups + group) * rows + places.view(-1)[entries])[order]


def _bring(index: Tensor, missing: Tensor, place: Tensor, holder: Tensor, uses: Tensor, first: int) -> Tensor:
    """Gives rows from `first` on to the slots of one list that lie in none; returns which entries bring one: of a slot listed twice the
    first."""
    found = place[index[(index >= 0) & ~missing]].long()
    uses -= uses >> 3
    uses[found.unique()] += USE
    free = uses.masked_fill(holder < 0, -1)
    free[found] = torch.iinfo(torch.int32).max
    wanted = index[missing].tolist()
    firsts = sorted(set(wanted), key=wanted.index)
    given = (free[first:].argsort(stable=True)[: len(firsts)] + first).sort().values
    old, new = holder[given].long(), torch.tensor(firsts, device=index.device)
    place[old[old >= 0]] = -1
    holder[given], uses[given], place[new] = new.int(), USE, given.int()
    bring = torch.tensor([number == wanted.index(each) for number, each in enumerate(wanted)], device=index.device)
    return missing.masked_scatter(missing, bring)


def _put_tail(place: Tensor, holder: Tensor, tail: int, base: int, vacant: int) -> None:
    """The first `tail` rows hold the slots from `base` on, which lie nowhere else, and `vacant` rows behind them nothing."""
    rows = torch.arange(tail + vacant, device=place.device, dtype=torch.int32)
    slots = torch.where(rows < tail, rows + base, -1)
    for row, column, number in (holder[..., : tail + vacant] != slots).nonzero().tolist():
        if holder[row, column, number] >= 0:
            place[row, column, int(holder[row, column, number])] = -1
    holder.masked_fill_((holder >= base) & (holder < base + tail), -1)
    holder[..., : tail + vacant] = slots
    place[..., base : base + tail] = rows[:tail]
