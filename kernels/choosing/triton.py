"""Choosing slots on GPUs: nothing but the decision to use a selection again is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels import triton_best
from kvpress.kernels.choosing import triton_kernels
from kvpress.kernels.triton_support import on_device

BLOCK = 1024


def best_slots(scores: Tensor, count: int) -> Tensor:
    """See `kvpress.kernels.choosing.best_slots`: a program for each row."""
    rows, slots = scores.float().contiguous(), scores.shape[-1]
    output = torch.empty(*rows.shape[:-1], count, dtype=torch.int64, device=scores.device)
    if output.numel():
        with on_device(scores):
            triton_kernels.best_kernel[(output.numel() // count, 1, 1)](
                rows, output, slots, count, BLOCK=triton_best.BLOCK, num_warps=triton_best.WARPS
            )
    return output


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
            row, former, live, cosines, None, None, None, heads * dim, *row.stride(), former.stride(0),
            DIM=dim, ROTARY=0, GROUP=1, KV_HEADS=0, BLOCK=BLOCK,
        )  # fmt: skip
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
