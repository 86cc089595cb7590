"""Choosing slots on GPUs: nothing but the decision to use a selection again is waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import triton_best
from kvpress.kernels.choosing import triton_kernels
from kvpress.kernels.triton_support import on_device

BLOCK = 1024


def best_slots(scores: Tensor, count: int) -> Tensor:
    """See `kvpress.kernels.choosing.best_slots`: a program for each row, or for each piece of a long one first."""
    rows, shape = scores.float().reshape(-1, scores.shape[-1]).contiguous(), (*scores.shape[:-1], count)
    if not rows.numel():
        return torch.empty(shape, dtype=torch.int64, device=scores.device)
    rows, places = best_of_pieces(rows, count)
    return _best(rows, places, count, 1, scores=False)[0].view(shape)


def best_of_pieces(rows: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The scores among which are the `count` best of each row, so few that a program holds them, and their places, which are `None` where
    they are all of the row's, in order.
    """
    pieces = pieces_of(rows.shape[-1], count)
    if pieces == 1:
        return rows, None
    places, best = _best(rows, None, count, pieces, scores=True)
    return best, places


def pieces_of(slots: int, count: int) -> int:
    """Into how many pieces to cut a row whose `count` best are wanted, so that a program holds a piece; 1 where that saves nothing."""
    pieces = -(-slots // triton_best.MOST)
    return pieces if slots // pieces >= 2 * count else 1


def _best(rows: Tensor, places: Tensor | None, count: int, pieces: int, *, scores: bool) -> tuple[Tensor, Any]:
    """Places `[rows, pieces * count]`, and with `scores` what stands there."""
    shape = (rows.shape[0], pieces * count)
    output = torch.empty(shape, dtype=torch.int64, device=rows.device)
    best = torch.empty(shape, dtype=torch.float32, device=rows.device) if scores else None
    with on_device(rows):
        triton_kernels.best_kernel[(rows.shape[0], pieces, 1)](
            rows, places, output, best, rows.shape[-1], count, pieces,
            **triton_best.best_arguments(-(-rows.shape[-1] // pieces)), num_warps=triton_best.WARPS,
        )  # fmt: skip
    return output, best


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
