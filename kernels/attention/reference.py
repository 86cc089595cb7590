"""Attention over slots in plain torch: the specification. Scores of at most `ROWS` query rows exist at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.scores import accumulator_type, flat_to_dense, scale_slots, select_slots, slot_scores

ROWS = 256  # query rows whose scores are held at once


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
    weights: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `kvpress.kernels.attention.attend`. With `s = scaling * query . key`, capped, and `-inf` where not visible:

    lse = log(sum_slots exp(s) + exp(sink));   output = sum_slots exp(s - lse) * value

    and, where `weights` names a reduction, the `exp(s - lse)` of the single row reduced over the group.
    """
    keys, values = scale_slots(keys, keys_scale), scale_slots(values, values_scale)
    if starts is not None and lengths is not None:
        keys, values, positions = flat_to_dense(keys, values, positions, starts, lengths)
    if index is not None:
        keys, values, positions = select_slots(keys, values, positions, index)
    kind = accumulator_type(query)
    batch, query_heads, rows, _ = query.shape
    kv_heads = keys.shape[1]
    group = query_heads // kv_heads
    outputs, sums, reduced = [], [], None
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        row_positions = None if query_positions is None else query_positions[:, first:last]
        scores = slot_scores(query[:, :, first:last], keys, positions, row_positions, scaling, softcap)
        lse = torch.logsumexp(scores, dim=-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(kind).view(1, kv_heads, group, 1))
        shares = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        if weights is not None:
            reduced = reduce_group(shares[:, :, :, 0], weights)
        output = torch.einsum("bhgrs,bhsd->bhgrd", shares, values.to(kind))
        outputs.append(output.reshape(batch, query_heads, last - first, -1))
        sums.append(lse.reshape(batch, query_heads, last - first))
    return torch.cat(outputs, dim=2).to(query.dtype), torch.cat(sums, dim=2), reduced


def reduce_group(shares: Tensor, reduction: str) -> Tensor:
    """`[batch, kv_heads, group, slots]` to `[batch, kv_heads, slots]`."""
    if reduction == "max":
        return shares.amax(dim=2)
    return shares.mean(dim=2) if reduction == "mean" else shares.sum(dim=2)
