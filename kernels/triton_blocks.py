"""Pieces of Triton kernels that several operations inline."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.triton_support import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FULL = tl.float32  # the arithmetic in which products are fp32
FAR = tl.constexpr(2**31 - 1)


def arithmetic(query: Tensor, *stored: Tensor) -> tl.dtype:
    """The type that products are taken in: fp32 if query or storage is fp32, else that of the query (int8 fits in it exactly).

    Sums are fp32 always. The interpreter multiplies the bit patterns of bf16, so there it is fp32, in which bf16 products are exact.
    """
    if torch.float32 in (query.dtype, *(tensor.dtype for tensor in stored)):
        return FULL
    if query.dtype == torch.bfloat16:
        return FULL if interpreted() else tl.bfloat16
    return tl.float16


def precision() -> str:
    """How fp32 products are taken: in three tf32 parts on NVIDIA's tensor cores (plain FMA spills), natively on AMD's."""
    return "ieee" if interpreted() or torch.version.hip else "tf32x3"


@triton.jit
def soft_capped(scores, softcap):
    """`softcap * tanh(scores / softcap)`; near 0 by the series, where the quotient of exponentials cancels."""
    ratio = scores / softcap
    size = tl.abs(ratio)
    decay = tl.exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    square = ratio * ratio
    near = ratio * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    return softcap * tl.where(size < 0.05, near, tl.where(ratio < 0, -far, far))


@triton.jit
def listed_slots(
    index, positions, entry, end, length, index_base, positions_base, stride_is, stride_ps, RAGGED: tl.constexpr
):
    """Slot and position of each entry of a list (or of the slots themselves); position -1 where there is nothing to see."""
    listed = entry < end
    if index is not None:
        slot = tl.load(index + index_base + entry.to(tl.int64) * stride_is, mask=listed, other=-1).to(tl.int64)
        held = slot >= 0
        if RAGGED:
            held = held & (slot < length)
    else:
        slot = entry.to(tl.int64)
        held = listed
    if positions is not None:
        position = tl.load(positions + positions_base + slot * stride_ps, mask=held, other=-1).to(tl.int32)
    else:
        position = tl.where(held, 0, -1)
    return slot, position


@triton.jit
def rotated(tile, tile_base, slot, position, channel, held, stride_s, stride_d, cos, sin, HALF: tl.constexpr):
    """Rotate a `[channels, slots]` tile by its positions: channel `d` is paired with `d + HALF`, as rotate-half does."""
    in_rotation = channel < 2 * HALF
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    mask = held[None, :] & in_rotation[:, None]
    other = tl.load(
        tile_base + slot[None, :] * stride_s + partner[:, None].to(tl.int64) * stride_d, mask=mask, other=0.0
    ).to(tl.float32)
    other = tl.where(channel[:, None] < HALF, -other, other)
    place = position[None, :].to(tl.int64) * HALF + (channel % HALF)[:, None]
    cosine = tl.load(cos + place, mask=mask, other=1.0).to(tl.float32)
    sine = tl.load(sin + place, mask=mask, other=0.0).to(tl.float32)
    return tile.to(tl.float32) * cosine + other * sine
