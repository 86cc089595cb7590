"""Head vote in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.attention_mass.reference import attention_mass
from kvpress.kernels.packing.int4 import codes_of, rounded_query
from kvpress.kernels.scores import accumulator_type


def head_vote(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    keys_scale: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.head_vote.head_vote`: the attention mass of a single row, summed over query heads."""
    if keys.dtype == torch.uint8:
        kind = accumulator_type(query)
        query, keys, scaling = rounded_query(query.to(kind) * scaling).to(kind), codes_of(keys), 1.0
    mass = attention_mass(
        query,
        keys,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        softcap=None,
        sinks=None,
        keys_scale=keys_scale,
    )
    return mass.sum(dim=1)
