"""Packing in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.packing.int4 import ZERO, mixed_channels

LEVELS, INT4_LEVELS, SCALE_BYTES = 127, 7, 4


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


def pack_int4(rows: Tensor, centre: Tensor | None) -> Tensor:
    """See `kvpress.kernels.packing.pack_int4`."""
    dim, wide = rows.shape[-1], rows.float()
    wide = mixed_channels(wide if centre is None else wide - centre.float()[..., None, :])
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scale = largest / torch.full_like(largest, INT4_LEVELS)
    codes = (
        (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().nan_to_num_(0.0).add_(ZERO).to(torch.uint8)
    )
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], dim // 2 + SCALE_BYTES, dtype=torch.uint8, device=rows.device)
    stored[..., : dim // 2] = codes[..., ::2] | codes[..., 1::2] << 4
    stored[..., dim // 2 :].view(torch.float32).copy_(scale / (dim & -dim))
    return stored
