"""Pages in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpress.kernels.choosing.reference import best_slots
from kvpress.kernels.pages.rounding import rounded_down, rounded_up
from kvpress.kernels.scores import accumulator_type


def page_bounds(keys: Tensor, page_size: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.pages.page_bounds`."""
    slots = keys.shape[2]
    pages = -(-slots // page_size)
    absent = torch.zeros(1, 1, slots, dtype=torch.bool, device=keys.device) if positions is None else positions < 0
    bounds = []
    for worst, reduce in ((torch.inf, torch.amin), (-torch.inf, torch.amax)):
        held = keys.masked_fill(absent[..., None], worst)
        whole = pad(held, (0, 0, 0, pages * page_size - slots), value=worst)
        bounds.append(reduce(whole.unflatten(2, (pages, page_size)), dim=3))
    return rounded_down(bounds[0]), rounded_up(bounds[1])


def page_scores(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """See `kvpress.kernels.pages.page_scores`."""
    kind = accumulator_type(query)
    batch, kv_heads, pages, dim = lowest.shape
    empty = lowest[..., 0] > highest[..., 0]
    grouped = query.to(kind).reshape(batch, kv_heads, -1, 1, dim)
    low, high = (bound.to(kind).masked_fill(empty[..., None], 0)[:, :, None] for bound in (lowest, highest))
    scores = (grouped * torch.where(grouped.signbit(), low, high)).sum(dim=-1)
    return scores.masked_fill(empty[:, :, None], -torch.inf).reshape(batch, query.shape[1], pages)


def page_slots(
    scores: Tensor,
    count: int,
    kv_heads: int,
    page_size: int,
    slots: int,
    first: Tensor | None,
    newest: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.pages.page_slots`."""
    batch, _, pages = scores.shape
    bound = scores.reshape(batch, kv_heads, -1, pages).amax(dim=2)
    bound = bound.masked_fill(bound.isnan(), -torch.inf)
    offset = 0 if first is None else first
    last = torch.as_tensor(slots - 1 - offset if newest is None else newest, device=scores.device)
    bound = bound.scatter(-1, (last // page_size).expand(batch, kv_heads, 1), torch.inf)
    best = best_slots(bound, count)
    best = best.masked_fill(bound.gather(-1, best) == -torch.inf, slots)  # past the end: no slot
    index = (best[..., None] * page_size + torch.arange(page_size, device=best.device)).flatten(-2) + offset
    return index.masked_fill(index >= slots, -1)


def widen_last_page(lowest: Tensor, highest: Tensor, key: Tensor, begins: bool) -> None:
    """Take `key [batch, kv_heads, 1, dim]` into the last page of the bounds, in place; `begins`: as its first."""
    low, high = lowest[:, :, -1:], highest[:, :, -1:]
    least, most = rounded_down(key), rounded_up(key)
    low.copy_(least if begins else torch.minimum(low, least))
    high.copy_(most if begins else torch.maximum(high, most))
