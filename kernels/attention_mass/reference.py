"""Attention mass in plain torch: the specification. Scores of at most `ROWS` query rows exist at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.scores import accumulator_type, flat_to_dense, slot_scores

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
    row_weights: Tensor | None = None,
) -> Tensor:
    """See `kvpress.kernels.attention_mass.attention_mass`: `sum_rows exp(s - lse)` with the `s` and `lse` of attention."""
    if starts is not None and lengths is not None:
        keys, _, positions = flat_to_dense(keys, keys, positions, starts, lengths)
    kind = accumulator_type(query)
    batch, query_heads, rows, _ = query.shape
    kv_heads, slots = keys.shape[1:3]
    group = query_heads // kv_heads
    mass = torch.zeros(batch, kv_heads, group, slots, dtype=kind, device=query.device)
    for first in range(0, rows, ROWS):
        row_positions = None if query_positions is None else query_positions[:, first : first + ROWS]
        scores = slot_scores(query[:, :, first : first + ROWS], keys, positions, row_positions, scaling, softcap)
        lse = torch.logsumexp(scores, dim=-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(kind).view(1, kv_heads, group, 1))
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        if row_weights is not None:
            weights = weights * row_weights[:, None, None, first : first + ROWS, None].to(kind)
        mass += weights.sum(dim=3)
    return mass.reshape(batch, query_heads, slots)
