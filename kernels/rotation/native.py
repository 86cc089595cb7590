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
    batch, heads, length, dim = slots.shape
    cosine, sine = native.as_floats(cosine), native.as_floats(sine)
    output = torch.empty(batch, heads, length, dim, dtype=slots.dtype)
    placed = (0, 0, 0, 0)
    if positions is None:
        tables = (*native.batch_and_head_strides(cosine, batch, heads), cosine.stride(2))
    else:
        positions = native.as_int64(positions)
        tables = (0, 0, cosine.stride(0))
        placed = (
            positions.data_ptr(),
            *native.batch_and_head_strides(positions, batch, heads),
            cosine.shape[0],
        )
    native.built().rotate(
        torch.get_num_threads(),
        batch,
        heads,
        length,
        dim,
        cosine.shape[-1],
        slots.data_ptr(),
        native.FLOATS[slots.dtype],
        *slots.stride()[:3],
        cosine.data_ptr(),
        sine.data_ptr(),
        *tables,
        *placed,
        -1.0 if inverse else 1.0,
        output.data_ptr(),
    )
    return output
