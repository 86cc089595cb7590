"""Rotation on GPUs: rotary position embedding applied to, or taken off, slots in one pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.rotation import triton_kernels
from kvpress.kernels.triton_launch import PreparedLaunch
from kvpress.kernels.triton_support import ALIGNED, named_strides, on_device, power_of_two

BLOCK_ELEMENTS = 4096  # elements of a tile
KINDS = 64  # of tensors, whose launches are kept


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
    return rotate_into(slots.new_empty(batch, heads, length, dim), slots, cosine, sine, inverse=inverse)


def rotate_into(output: Tensor, slots: Tensor, cosine: Tensor, sine: Tensor, *, inverse: bool) -> Tensor:
    """As `rotate`, into `output [batch, heads, slots, dim]`, whose rows lie one behind the other, and not where the slots lie."""
    if output.numel():
        given = (slots, cosine, sine, output)
        aligned = tuple([tensor.data_ptr() % ALIGNED == 0 for tensor in given])
        kinds = tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in given])
        with on_device(slots):
            grid, launch = _launch(slots.device, *kinds, aligned, inverse)
            launch(grid, source=slots, cosine=cosine, sine=sine, output=output)
    return output


Kind = tuple[torch.Size, tuple[int, ...], torch.dtype]


@lru_cache(maxsize=KINDS)
def _launch(
    device: torch.device, slots: Kind, cosine: Kind, sine: Kind, output: Kind, aligned: tuple[bool, ...], inverse: bool
) -> tuple[tuple[int, int, int], PreparedLaunch]:
    """Grid and launch for tensors of these kinds."""
    batch, heads, length, dim = slots[0]
    block_d = power_of_two(dim)
    block_n = max(1, BLOCK_ELEMENTS // block_d)
    given = zip("xcp", (slots, cosine, sine), strict=True)
    strides = [named_strides(letter, shape, stride, "bhsd") for letter, (shape, stride, _) in given]
    arguments: dict[str, Any] = {
        "slots": length, "sign": -1.0 if inverse else 1.0, **strides[0], **strides[1], **strides[2],
        "stride_ob": output[1][0], "stride_oh": output[1][1],
        "HEADS": heads, "DIM": dim, "ROTARY": cosine[0][-1], "BLOCK_N": block_n, "BLOCK_D": block_d,
    }  # fmt: skip
    return (-(-length // block_n), batch * heads, 1), PreparedLaunch(triton_kernels.rotate_kernel, arguments)
