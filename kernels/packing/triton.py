"""Packing on GPUs: the launch of the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.packing import triton_kernels
from kvpress.kernels.packing.reference import SCALE_BYTES
from kvpress.kernels.triton_support import on_device, power_of_two, strides

BLOCK_ELEMENTS = 2048  # elements of a tile


def pack_int8(rows: Tensor) -> Tensor:
    """See `kvpress.kernels.packing.pack_int8`."""
    dim = rows.shape[-1]
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], dim + SCALE_BYTES, dtype=torch.int8, device=rows.device)
    if stored.numel():
        wide = rows.reshape(1, 1, *rows.shape) if rows.dim() == 2 else rows[None] if rows.dim() == 3 else rows
        batch, heads, count, _ = wide.shape
        block_d = power_of_two(dim)
        block_n = max(1, min(power_of_two(count), BLOCK_ELEMENTS // block_d))
        with on_device(rows):
            triton_kernels.pack_kernel[(-(-count // block_n), batch * heads)](
                wide, stored, stored.view(torch.float32), count, heads, **strides("r", wide, "bhsd"),
                DIM=dim, BLOCK_N=block_n, BLOCK_D=block_d,
            )  # fmt: skip
    return stored
