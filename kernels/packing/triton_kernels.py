"""Triton kernel of packing: rows rounded to int8, each with its scale behind it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered

LEVELS = tl.constexpr(127.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal number of fp32
HALVES = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to an integer, halves to the even one


@Remembered
@triton.jit(do_not_specialize=["count", "stride_rh", "stride_rb"])
def pack_kernel(
    rows, codes, scales, count, heads,
    stride_rb, stride_rh, stride_rs, stride_rd,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_N` rows of one batch row and head; `codes` and `scales` are two views of the packed rows."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    held = (row < count)[:, None] & (channel < DIM)[None, :]
    at = batch * stride_rb + head * stride_rh + row[:, None] * stride_rs + channel[None, :].to(tl.int64) * stride_rd
    value = tl.load(rows + at, mask=held, other=0.0).to(tl.float32)
    unknown = tl.max((value != value).to(tl.int32), axis=1) > 0
    scale = tl.div_rn(tl.max(tl.abs(value), axis=1), LEVELS)
    scale = tl.where(unknown, float("nan"), scale)
    divisor = tl.where(scale < TINY, TINY, scale)
    code = tl.div_rn(value, tl.broadcast_to(divisor[:, None], value.shape))
    code = (code + HALVES) - HALVES
    code = tl.where(code == code, code, 0.0)
    out = tl.program_id(1).to(tl.int64) * count + row
    tl.store(codes + out[:, None] * (DIM + 4) + channel[None, :], code.to(tl.int8), mask=held)
    tl.store(scales + out * (DIM // 4 + 1) + DIM // 4, scale, mask=row < count)
