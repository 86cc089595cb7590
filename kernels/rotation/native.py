"""Rotation by the compiled CPU kernels (`kernels/native/rotation.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as native


def refusal(slots: Tensor, cosine: Tensor, sine: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if not (cosine.is_cpu and sine.is_cpu):
        return "native kernels read host memory only"
    return native.refusal(slots, slots, slots)


def rotate(slots: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """See `kvpress.kernels.rotation.rotate`."""
    cosine, sine = native.as_floats(cosine), native.as_floats(sine)
    positions = None if positions is None else native.as_int64(positions)
    before, behind = fields(slots, cosine, sine, positions, inverse)
    output = torch.empty(slots.shape, dtype=slots.dtype)
    native.built().rotate(torch.get_num_threads(), *before, slots.data_ptr(), *behind, output.data_ptr())
    return output


def fields(
    slots: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The fields of `Rotation` before the address of `slots` and behind it, but for threads and output."""
    batch, heads, length, dim = slots.shape
    placed = (0, 0, 0, 0)
    if positions is None:
        tables = (*native.batch_and_head_strides(cosine, batch, heads), cosine.stride(2))
    else:
        tables = (0, 0, cosine.stride(0))
        placed = (
            positions.data_ptr(),
            *native.batch_and_head_strides(positions, batch, heads),
            cosine.shape[0],
        )
    strides = slots.stride()
    behind = (
        native.FLOATS[slots.dtype],
        strides[0],
        strides[1],
        strides[2],
        cosine.data_ptr(),
        sine.data_ptr(),
        *tables,
        *placed,
        -1.0 if inverse else 1.0,
    )
    return (batch, heads, length, dim, cosine.shape[-1]), behind
