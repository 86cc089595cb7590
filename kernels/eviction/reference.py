"""Eviction of one slot a head in plain torch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

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


def overwrite(columns: Sequence[Tensor], rows: Sequence[Tensor], slot: Tensor, starts: Tensor | None) -> None:
    """See `kvpress.kernels.eviction.overwrite`."""
    batch, kv_heads = slot.shape
    if bool((slot < 0).any()):
        raise IndexError("slot must name slots that exist, got a negative one")
    for column, row in zip(columns, rows, strict=True):
        row = row.expand(batch, kv_heads, *row.shape[2:])
        if starts is not None:
            column[starts + slot] = row
        else:
            b = torch.arange(batch, device=slot.device)[:, None]
            h = torch.arange(kv_heads, device=slot.device)
            column[b, h, slot] = row
