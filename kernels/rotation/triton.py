"""Rotation on GPUs: rotary position embedding applied to, or taken off, slots in one pass."""

from __future__ import annotations

from torch import Tensor

from kvpress.kernels.rotation import triton_kernels
from kvpress.kernels.triton_support import on_device, power_of_two, strides

BLOCK_ELEMENTS = 4096  # elements of a tile


def rotate(slots: Tensor, cosine: Tensor, sine: Tensor, *, inverse: bool = False) -> Tensor:
    """`slots * cosine + rotate_half(slots) * sine` over the first `rotary_dim` channels, in the type of `slots` (fp32
    arithmetic).

    Args:
        slots: `[batch, heads, slots, dim]`.
        cosine, sine: `[batch or 1, heads or 1, slots, rotary_dim]`, the two halves alike, scaled as the model scales
            them.
        inverse: rotate the other way, which undoes a rotation by unscaled tables.

    Raises:
        ValueError: an odd `rotary_dim`, or one above `dim`.
    """
    batch, heads, length, dim = slots.shape
    rotary = cosine.shape[-1]
    if rotary % 2 or rotary > dim:
        raise ValueError(f"rotary_dim must be even and at most dim ({dim}), got {rotary}")
    output = slots.new_empty(batch, heads, length, dim)
    if output.numel():
        block_d = power_of_two(dim)
        block_n = max(1, BLOCK_ELEMENTS // block_d)
        with on_device(slots):
            triton_kernels.rotate_kernel[(-(-length // block_n), batch * heads)](
                slots, cosine, sine, output, length, -1.0 if inverse else 1.0,
                **strides("x", slots, "bhsd"), **strides("c", cosine, "bhsd"), **strides("p", sine, "bhsd"),
                HEADS=heads, DIM=dim, ROTARY=rotary, BLOCK_N=block_n, BLOCK_D=block_d,
            )  # fmt: skip
    return output
