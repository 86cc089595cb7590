"""Head vote by the compiled CPU kernels (`kernels/native/vote.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as native
from kvpress.kernels.shapes import most_slots


def refusal(query: Tensor, keys: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    return native.vote_refusal(query, keys)


def head_vote(
    query: Tensor,
    keys: Tensor,
    *,
    kv_heads: int,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    keys_scale: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.head_vote.head_vote`."""
    entries = most_slots(keys, lengths)
    votes = torch.empty(query.shape[0], entries, dtype=torch.float32)
    fields, owners = native.attention_fields(
        query,
        keys,
        keys,
        kv_heads=kv_heads,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        keys_scale=keys_scale,
        weights=votes.data_ptr(),
        entries=entries,
    )
    native.built().head_vote(*fields)
    del owners
    return votes
