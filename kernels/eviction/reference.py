"""Eviction of one slot a head in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def weakest(
    scores: Tensor,
    positions: Tensor,
    sinks: int | Tensor,
    first_recent: int | Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.eviction.weakest`: the least of (empty < plain < protected, score, position, slot)."""
    scores, positions = torch.broadcast_tensors(scores, positions)
    largest = torch.finfo(torch.float32).max
    scores = torch.nan_to_num(scores.float(), nan=-largest, posinf=largest, neginf=-largest)
    protected = positions < sinks
    if first_recent is not None:
        protected = protected | (positions >= first_recent)
    scores = scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)
    exists = torch.ones_like(protected)
    if lengths is not None:
        exists = torch.arange(scores.shape[-1], device=scores.device) < lengths[..., None]
    lowest = scores.masked_fill(~exists, torch.inf).amin(dim=-1, keepdim=True)
    ranks = positions.long().clamp(min=-1).masked_fill((scores != lowest) | ~exists, torch.iinfo(torch.int64).max)
    return ranks.argmin(dim=-1).masked_fill(~exists.any(dim=-1), -1)
