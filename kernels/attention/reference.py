"""Attention over slots in plain torch: the specification. Scores of at most `ROWS` query rows exist at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.scores import accumulator_type, flat_to_dense, select_slots, slot_scores

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
) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.attention.attend`. With `s = scaling * query . key`, capped, and `-inf` where not visible:

    lse = log(sum_slots exp(s) + exp(sink));   output = sum_slots exp(s - lse) * value
    """
    if starts is not None and lengths is not None:
        keys, values, positions = flat_to_dense(keys, values, positions, starts, lengths)
    if index is not None:
        keys, values, positions = select_slots(keys, values, positions, index)
    kind = accumulator_type(query)
    batch, query_heads, rows, _ = query.shape
    kv_heads = keys.shape[1]
    group = query_heads // kv_heads
    outputs, sums = [], []
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        row_positions = None if query_positions is None else query_positions[:, first:last]
        scores = slot_scores(query[:, :, first:last], keys, positions, row_positions, scaling, softcap)
        lse = torch.logsumexp(scores, dim=-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(kind).view(1, kv_heads, group, 1))
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        output = torch.einsum("bhgrs,bhsd->bhgrd", weights, values.to(kind))
        outputs.append(output.reshape(batch, query_heads, last - first, -1))
        sums.append(lse.reshape(batch, query_heads, last - first))
    return torch.cat(outputs, dim=2).to(query.dtype), torch.cat(sums, dim=2)
