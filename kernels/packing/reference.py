"""Packing in torch."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS, SCALE_BYTES = 127, 4


def pack_int8(rows: Tensor) -> Tensor:
    """See `kvpress.kernels.packing.pack_int8`."""
    dim, wide = rows.shape[-1], rows.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scale = largest / torch.full_like(
        largest, LEVELS
    )  # GPUs divide by a number as a product with its inverse, which rounds otherwise
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], dim + SCALE_BYTES, dtype=torch.int8, device=rows.device)
    stored[..., :dim] = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    stored[..., dim:].view(torch.float32).copy_(scale)
    return stored
