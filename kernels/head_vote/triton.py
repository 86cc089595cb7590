"""Head vote on GPUs: one pass over the keys stores scores and their log-sum-exp, a second one over the scores sums
the votes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.attention_mass.triton import part_sums
from kvpress.kernels.head_vote import triton_kernels
from kvpress.kernels.packing.int4 import rounded_query
from kvpress.kernels.shapes import most_slots
from kvpress.kernels.triton_support import on_device

BLOCK_HEADS = 16
BLOCK_SLOTS = 256


def head_vote(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float = 1.0,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    keys_scale: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `kvpress.kernels.head_vote.head_vote`.

    Args:
        splits: parts of the context that programs of their own read; `None`: as many as keep the GPU busy.

    Raises:
        ValueError: more than one query row.
    """
    if query.shape[2] != 1:
        raise ValueError(f"query must have a single row to vote, got {query.shape[2]}")
    batch, query_heads = query.shape[:2]
    slots = most_slots(keys, lengths)
    votes = query.new_empty(batch, slots, dtype=torch.float32)
    if votes.numel() == 0:
        return votes
    if keys.dtype == torch.uint8:
        query, scaling = rounded_query(query.float() * scaling), 1.0
    lse, scores = part_sums(
        query, keys, splits=splits, store=True, slots=slots, scaling=scaling, positions=positions,
        query_positions=query_positions, starts=starts, lengths=lengths, softcap=None, keys_scale=keys_scale,
        temperature=1.0, noise_seed=None,
    )  # fmt: skip
    with on_device(query):
        triton_kernels.vote_kernel[(-(-slots // BLOCK_SLOTS), batch)](
            scores,
            lse,
            votes,
            query_heads,
            batch * query_heads,
            slots,
            lse.shape[0],
            BLOCK_H=BLOCK_HEADS,
            BLOCK_N=BLOCK_SLOTS,
        )
    return votes
