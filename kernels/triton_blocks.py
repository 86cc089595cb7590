"""Pieces of Triton kernels that several operations inline."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.triton_support import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
FULL = tl.float32  # the arithmetic in which products are fp32
FAR = tl.constexpr(2**31 - 1)


def arithmetic(query: Tensor, *stored: Tensor) -> tl.dtype:
    """The type that products are taken in: fp32 if query or storage is fp32, else that of the query (int8 fits in it
    exactly).

    Sums are fp32 always. The interpreter multiplies the bit patterns of bf16, so there it is fp32, in which bf16
    products are exact.
    """
    if torch.float32 in (query.dtype, *(tensor.dtype for tensor in stored)):
        return FULL
    if query.dtype == torch.bfloat16:
        return FULL if interpreted() else tl.bfloat16
    return tl.float16


def precision() -> str:
    """How fp32 products are taken: in three tf32 parts on NVIDIA's tensor cores (plain FMA spills), natively on
    AMD's.
    """
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
    """Slot and position of each entry of a list (or of the slots themselves); position -1 where there is nothing to
    see.
    """
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
def rotated(key, key_at, channel, held, place, stride_kd, cosine, sine, ROTARY: tl.constexpr):
    """A `[channels, slots]` tile of keys turned by `place`: channel `d` is paired with `d + ROTARY / 2`, as
    rotate-half does.
    """
    low = channel < ROTARY // 2
    partner = tl.where(low, channel + ROTARY // 2, channel - ROTARY // 2)
    mask = held[None, :] & (channel < ROTARY)[:, None]
    other = tl.load(key_at + partner[:, None].to(tl.int64) * stride_kd, mask=mask, other=0).to(tl.float32)
    other = tl.where(low[:, None], -other, other)
    at = place.to(tl.int64)[None, :] * ROTARY + channel[:, None]
    cos = tl.load(cosine + at, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(sine + at, mask=mask, other=0.0).to(tl.float32)
    return key.to(tl.float32) * cos + other * sin


@triton.jit
def query_tile(query_at, channel, row_held, stride_qd, DIM: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Query rows `[rows, channels]` from `query_at [rows, 1]`."""
    mask = row_held[:, None] & (channel[None, :] < DIM)
    return tl.load(query_at + channel[None, :].to(tl.int64) * stride_qd, mask=mask, other=0.0).to(ARITHMETIC)


@triton.jit
def tile_scores(
    asked, query_at, key_at, scale_at, row_held, held, stride_qd, stride_kd, scaling, softcap,
    place, cosine, sine, ROTARY: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[rows, slots]` of the query rows with keys at `key_at [1, slots]`, whose scales are at `scale_at [slots]`: dot products,
    scaled and capped.

    `asked` is the whole `query_tile` where `CHUNK_D == BLOCK_D`. In chunks the query is read anew (from cache) with
    every tile: held
    whole it would not fit the registers.
    """
    channel = tl.arange(0, CHUNK_D)
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in tl.static_range(BLOCK_D // CHUNK_D):
        within = channel + chunk * CHUNK_D
        at = within if key_at.dtype.element_ty != tl.uint8 else within // 2
        key = tl.load(
            key_at + at[:, None].to(tl.int64) * stride_kd, mask=held[None, :] & (within[:, None] < DIM), other=0
        )
        if key_at.dtype.element_ty == tl.uint8:  # int4: two channels a byte, each plus 8
            key = ((key >> (within % 2 * 4)[:, None].to(tl.uint8)) & 15).to(tl.int8) - 8
        if cosine is not None:
            key = rotated(key, key_at, within, held, place, stride_kd, cosine, sine, ROTARY)
        if CHUNK_D == BLOCK_D:
            part = asked
        else:
            part = tl.load(
                query_at + within[None, :].to(tl.int64) * stride_qd,
                mask=row_held[:, None] & (within[None, :] < DIM),
                other=0.0,
                volatile=True,
            ).to(ARITHMETIC)
        scores = tl.dot(part, key.to(ARITHMETIC), scores, input_precision=PRECISION)
    scores = scores * scaling
    if scale_at is not None:
        scores = scores * tl.load(scale_at, mask=held, other=0.0)[None, :]
    if softcap is not None:
        scores = soft_capped(scores, softcap)
    return scores


@triton.jit
def mixed(x):
    """The finalizer of MurmurHash3 (Appleby, public domain) over uint32."""
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x85EBCA6B, sanitize_overflow=False)
    x = x ^ (x >> 13)
    x = tl.mul(x, 0xC2B2AE35, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def gumbel(base, query_head, row_place, key_place):
    """Standard Gumbel noise `[rows, slots]`, a hash of seed (`base`), query head and the places of row and key,
    whatever the tiling.

    23 bits a number: with 24 the greatest one rounds to 1 in fp32, whose noise is infinite.
    """
    base, query_head = base.to(tl.uint32), query_head.to(tl.uint32)
    row_place, key_place = row_place.to(tl.uint32), key_place.to(tl.uint32)
    head = mixed(tl.add(base, tl.mul(query_head + 1, 0x9E3779B9, sanitize_overflow=False), sanitize_overflow=False))
    first = mixed(head ^ tl.mul(row_place, 0xC2B2AE3D, sanitize_overflow=False))
    second = mixed(tl.add(first, 0x27D4EB2F, sanitize_overflow=False))
    spread = tl.mul(key_place, 0x9E3779B9, sanitize_overflow=False)
    word = mixed(tl.add(spread[None, :], first[:, None], sanitize_overflow=False)) ^ second[:, None]
    word = tl.mul(word, 0x9E3779B1, sanitize_overflow=False)
    word = word ^ (word >> 15)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))
