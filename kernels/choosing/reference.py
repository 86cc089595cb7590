"""Choosing slots in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvpress.kernels.scores import accumulator_type, scale_slots


def best_slots(scores: Tensor, count: int) -> Tensor:
    """See `kvpress.kernels.choosing.best_slots`."""
    least = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    taken = scores >= least
    if int(taken.sum()) > count * (scores.numel() // max(scores.shape[-1], 1)):
        above, ties = scores > least, scores == least
        wanted = count - above.sum(dim=-1, keepdim=True)
        taken = above | (ties & (ties.flip(-1).cumsum(dim=-1).flip(-1) <= wanted))
    return taken.nonzero()[:, -1].view(*scores.shape[:-1], count)


def largest_products(query: Tensor, keys: Tensor, positions: Tensor | None, keys_scale: Tensor | None) -> Tensor:
    """See `kvpress.kernels.choosing.largest_products`."""
    batch, _, _, dim = query.shape
    kind = accumulator_type(query)
    grouped = query.to(kind).view(batch, keys.shape[1], -1, dim)
    products = torch.matmul(grouped, scale_slots(keys, keys_scale).to(kind).transpose(-1, -2)).amax(dim=2)
    products = products.masked_fill(products.isnan(), -torch.inf)
    return products if positions is None else products.masked_fill(positions < 0, -torch.inf)


def reused_slots(
    query: Tensor,
    former: Tensor,
    live: Tensor,
    chosen: Tensor,
    threshold: float,
    sinks: int,
    local: int,
    slots: int,
) -> Tensor | None:
    """See `kvpress.kernels.choosing.reused_slots`."""
    cosine = cosine_similarity(query.flatten(1).double(), former.double(), dim=-1)
    if not bool(((cosine >= threshold) & live).all()):
        return None
    return listed_slots(chosen, sinks, local, slots)


def listed_slots(chosen: Tensor, sinks: int, local: int, slots: int) -> Tensor:
    """See `kvpress.kernels.choosing.listed_slots`."""
    first = torch.arange(sinks, device=chosen.device).expand(*chosen.shape[:2], -1)
    window = torch.arange(slots - local, slots, device=chosen.device).expand(*chosen.shape[:2], -1)
    return torch.cat([first, chosen, window], dim=-1)
