"""Packing by the compiled CPU kernels (`kernels/native/packing.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as native
from kvpress.kernels.packing.reference import SCALE_BYTES


def refusal(rows: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if not 2 <= rows.dim() <= 4:
        return f"native packing takes rows of two to four dimensions, not {rows.dim()}"
    if rows.requires_grad and torch.is_grad_enabled():
        return "native kernels have no gradient"
    return native.refusal(rows, rows, rows) if rows.stride()[-1] == 1 else "rows must lie side by side"


def pack_int8(rows: Tensor) -> Tensor:
    """See `kvpress.kernels.packing.pack_int8`."""
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], rows.shape[-1] + SCALE_BYTES, dtype=torch.int8)
    native.built().pack_int8(*_fields(rows, 0, stored))
    return stored


def pack_int4(rows: Tensor, centre: Tensor | None) -> Tensor:
    """See `kvpress.kernels.packing.pack_int4`."""
    with torch.inference_mode(False):
        stored = torch.empty(*rows.shape[:-1], rows.shape[-1] // 2 + SCALE_BYTES, dtype=torch.uint8)
    centre = None if centre is None else native.as_floats(centre)
    native.built().pack_int4(*_fields(rows, 0 if centre is None else centre.data_ptr(), stored))
    return stored


def _fields(rows: Tensor, centre: int, stored: Tensor) -> tuple[int, ...]:
    """The fields of `Packing` in `arguments.hpp`."""
    shape, strides = (1, 1, *rows.shape)[-4:], (0, 0, *rows.stride())[-4:]
    kind = native.FLOATS[rows.dtype]
    return (torch.get_num_threads(), *shape, rows.data_ptr(), kind, *strides[:3], centre, stored.data_ptr())
