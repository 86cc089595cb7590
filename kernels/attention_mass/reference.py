"""Attention mass in plain torch: the specification. Scores of at most `ROWS` query rows exist at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.attention_mass.noise import gumbel
from kvpress.kernels.scores import accumulator_type, flat_to_dense, scale_slots, slot_scores

ROWS = 64  # query rows whose scores are held at once


def attention_mass(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None = None,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,
    temperature: float = 1.0,
    noise_seed: int | None = None,
) -> Tensor:
    """See `kvpress.kernels.attention_mass.attention_mass`: `sum_rows softmax((s + noise) / temperature)` over slots and
    sinks."""
    keys = scale_slots(keys, keys_scale)
    known = positions
    if starts is not None and lengths is not None:
        keys, _, positions = flat_to_dense(keys, keys, positions, starts, lengths)
    kind = accumulator_type(query)
    batch, query_heads, rows, _ = query.shape
    kv_heads, slots = keys.shape[1:3]
    group = query_heads // kv_heads
    mass = torch.zeros(batch, kv_heads, group, slots, dtype=kind, device=query.device)
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        row_positions = None if query_positions is None else query_positions[:, first:last]
        scores = slot_scores(query[:, :, first:last], keys, positions, row_positions, scaling, softcap)
        if noise_seed is not None:
            scores = scores + _noise(noise_seed, scores, None if known is None else positions, row_positions, first)
        scores = scores / temperature
        if lse is None:
            total = torch.logsumexp(scores, dim=-1)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.to(kind).view(1, kv_heads, group, 1) / temperature)
        else:
            total = lse[:, :, first:last].to(kind).view(batch, kv_heads, group, last - first)
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
        if row_weights is not None:
            weights = weights * row_weights[:, None, None, first:last, None].to(kind)
        mass += weights.sum(dim=3)
    return mass.reshape(batch, query_heads, slots)


def _noise(seed: int, scores: Tensor, positions: Tensor | None, query_positions: Tensor | None, first: int) -> Tensor:
    """Gumbel noise for `scores [batch, kv_heads, group, rows, slots]`; what has no position goes by its number."""
    _, kv_heads, group, rows, slots = scores.shape
    device = scores.device
    heads = torch.arange(kv_heads * group, device=device).view(1, kv_heads, group, 1, 1)
    if query_positions is None:
        query_positions = torch.arange(first, first + rows, device=device)[None]
    if positions is None:
        positions = torch.arange(slots, device=device)[None, None]
    return gumbel(seed, heads, query_positions[:, None, None, :, None], positions[:, :, None, None, :]).to(scores.dtype)
