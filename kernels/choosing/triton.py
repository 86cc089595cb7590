"""Choosing slots on GPUs: nothing but the decision to use a selection again is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.choosing import triton_kernels
from kvpress.kernels.triton_support import on_device

BLOCK = 1024


def best_slots(scores: Tensor, count: int) -> Tensor:
    """See `kvpress.kernels.choosing.best_slots`: a stable sort, so that nothing has to be known of ties."""
    slots = scores.shape[-1]
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return (slots - 1 - order).sort(dim=-1).values


def reused_slots(
    query: Tensor,
    former: Tensor,
    live: Tensor,
    chosen: Tensor,
    threshold: float,
    sinks: int,
    local: int,
    slots: int,
) -> Tensor | None:
    """See `kvpress.kernels.choosing.reused_slots`."""
    batch, heads, _, dim = query.shape
    cosines = torch.empty(batch, dtype=torch.float64, device=query.device)
    row = query[:, :, 0]
    with on_device(query):
        triton_kernels.cosine_kernel[(batch, 1, 1)](
            row, former, live, cosines, heads * dim, *row.stride(), former.stride(0), DIM=dim, BLOCK=BLOCK
        )
    if not all(cosine >= threshold for cosine in cosines.tolist()):
        return None
    return listed_slots(chosen, sinks, local, slots)


def listed_slots(chosen: Tensor, sinks: int, local: int, slots: int) -> Tensor:
    """See `kvpress.kernels.choosing.listed_slots`."""
    batch, heads, count = chosen.shape
    output = torch.empty(batch, heads, sinks + count + local, dtype=torch.int64, device=chosen.device)
    if output.numel():
        with on_device(chosen):
            triton_kernels.list_kernel[(-(-output.shape[-1] // BLOCK), batch * heads, 1)](
                chosen, output, count, sinks, local, slots, *chosen.stride(), HEADS=heads, BLOCK=BLOCK
            )
    return output
