"""From scores to kept slots: protection of sinks and windows, ties, NaN, padding. One place for every policy."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def ranked(scores: Tensor, positions: Tensor, sinks: int | Tensor, first_recent: int | Tensor) -> Tensor:
    """Scores `[batch, kv_heads, slots]` fp32 with a defined order.

    Empty slots get `-inf`, NaN the lowest finite value, infinities the largest finite ones, protected slots `+inf`.

    Args:
        scores: `[batch, kv_heads or 1, slots]`, higher = keep.
        positions: `[batch, kv_heads, slots]`, `-1` for empty slots.
        sinks: positions below are protected.
        first_recent: positions from here on are protected.
    """
    lowest = torch.finfo(torch.float32).min
    scores = torch.nan_to_num(scores.float(), nan=lowest, posinf=-lowest, neginf=lowest).expand(positions.shape)
    scores = scores.masked_fill((positions < sinks) | (positions >= first_recent), torch.inf)
    return scores.masked_fill(positions < 0, -torch.inf)


def survivors(scores: Tensor, counts: numpy.ndarray) -> Tensor:
    """The best slots of each head, in ascending order of slots. Of equal scores the later slot is kept.

    Args:
        scores: `[batch, kv_heads, slots]`; slots are in ascending order of position.
        counts: `[batch, kv_heads]` slots to keep, at most all.

    Returns:
        `[batch, kv_heads, most]` int64, `most` the largest count; of head `[b, h]` the last `counts[b, h]` entries count.
    """
    most = int(counts.max())
    best = scores.sort(dim=-1, stable=True).indices[..., scores.shape[-1] - most :]
    if counts.min() != most:
        surplus = (
            torch.arange(most, device=scores.device) < torch.from_numpy(most - counts).to(scores.device)[..., None]
        )
        best = best.masked_fill(surplus, -1)
    return best.sort(dim=-1).values.clamp(min=0)


def strongest(scores: Tensor, positions: Tensor, counts: numpy.ndarray) -> Tensor:
    """`[batch, kv_heads, slots]` bool: the best `counts [batch, kv_heads]` slots of each head, in whatever order slots are.

    Of equal scores the larger position is kept.
    """
    order = positions.argsort(dim=-1)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, stable=True))
    slots = scores.shape[-1]
    chosen = torch.arange(slots, device=scores.device) >= slots - torch.from_numpy(counts).to(scores.device)[..., None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
