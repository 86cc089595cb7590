"""Rotation by the compiled CPU kernels (`kernels/native/rotation.hpp`)."""

from __future__ import annotations

import struct
from array import array

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as native

# places of what differs from call to call among the fields of `Rotation` in `arguments.hpp`
THREADS, SOURCE, COSINE, SINE, OUTPUT = 0, 6, 11, 12, 21
_PACKED = struct.Struct("=20qd4q")


def refusal(slots: Tensor, cosine: Tensor, sine: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if not (cosine.is_cpu and sine.is_cpu):
        return "native kernels read host memory only"
    return native.refusal(slots, slots, slots)


def rotate(slots: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """See `kvpress.kernels.rotation.rotate`."""
    cosine, sine = native.as_floats(cosine), native.as_floats(sine)
    positions = None if positions is None else native.as_int64(positions)
    output = torch.empty(slots.shape, dtype=slots.dtype)
    native.built().rotate(*fields(slots, cosine, sine, positions, inverse, output))
    return output


def fields(
    slots: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None, inverse: bool, output: Tensor
) -> tuple[float, ...]:
    """The fields of `Rotation`; `SOURCE` and `OUTPUT` are where the addresses stand."""
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
    return (
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
        *output.stride()[:3],
    )


def packed(found: tuple[float, ...]) -> array[int]:
    """The fields in a buffer for `rotate_again`."""
    return array("q", _PACKED.pack(*found))
