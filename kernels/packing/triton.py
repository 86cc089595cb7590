"""Packing on GPUs: the launch of the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.packing import triton_kernels
from kvpress.kernels.packing.reference import SCALE_BYTES
from kvpress.kernels.triton_support import on_device, power_of_two, strides

BLOCK_ELEMENTS = 2048  # elements of a tile


def pack_int8(rows: Tensor) -> Tensor:
    """See `kvpress.kernels.packing.pack_int8`."""
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], rows.shape[-1] + SCALE_BYTES, dtype=torch.int8, device=rows.device)
    if stored.numel():
        _launch(triton_kernels.pack_kernel, rows, (), stored)
    return stored


def pack_int4(rows: Tensor, centre: Tensor | None) -> Tensor:
    """See `kvpress.kernels.packing.pack_int4`."""
    dim = rows.shape[-1]
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], dim // 2 + SCALE_BYTES, dtype=torch.uint8, device=rows.device)
    if stored.numel():
        centre = None if centre is None else centre.float().contiguous()
        _launch(triton_kernels.pack_int4_kernel, rows, (centre,), stored, STEPS=(dim & -dim).bit_length() - 1)
    return stored


def _launch(kernel: Any, rows: Tensor, more: tuple[Tensor | None, ...], stored: Tensor, **constants: int) -> None:
    """Let `kernel` write what is `stored` of the rows."""
    wide = rows.reshape(1, 1, *rows.shape) if rows.dim() == 2 else rows[None] if rows.dim() == 3 else rows
    batch, heads, count, dim = wide.shape
    block_d = power_of_two(dim)
    block_n = max(1, min(power_of_two(count), BLOCK_ELEMENTS // block_d))
    with on_device(rows):
        kernel[(-(-count // block_n), batch * heads)](
            wide, *more, stored, stored.view(torch.float32), count, heads, **strides("r", wide, "bhsd"),
            DIM=dim, BLOCK_N=block_n, BLOCK_D=block_d, **constants,
        )  # fmt: skip
