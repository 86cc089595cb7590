"""Triton kernels of pages: the bounds of the keys of each page, and the upper bound of a query's score over a page."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered


@triton.jit
def outwards(bound, BELOW: tl.constexpr):
    """`bound` in fp32 as the nearest bfloat16 numbers that are not above it (`BELOW`), or not below it; NaN stays NaN."""
    bits = bound.to(tl.int32, bitcast=True)
    away = ((bits < 0) == BELOW) & ((bits & 0xFFFF) != 0)
    shorter = (bits >> 16) + away.to(tl.int32)
    return tl.where(bound != bound, 0x7FC0, shorter).to(tl.int16).to(tl.bfloat16, bitcast=True)


@Remembered
@triton.jit(do_not_specialize=["slots", "pages", "stride_ph"])
def bounds_kernel(
    keys, positions, lowest, highest, slots, pages,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_pb, stride_ph, stride_ps,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the lowest and highest key of one page, channel by channel; `+inf` and `-inf` for a page without a
    token.
    """
    page = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    within = tl.arange(0, BLOCK_P)
    slot = page * PAGE + within
    held = (within < PAGE) & (slot < slots)
    if positions is not None:
        at = positions + batch * stride_pb + head * stride_ph + slot * stride_ps
        held = held & (tl.load(at, mask=held, other=-1) >= 0)
    channel = tl.arange(0, BLOCK_D)
    mask = held[:, None] & (channel[None, :] < DIM)
    at = batch * stride_kb + head * stride_kh + slot[:, None] * stride_ks + channel[None, :].to(tl.int64) * stride_kd
    key = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
    out = (tl.program_id(1).to(tl.int64) * pages + page) * DIM + channel
    low = tl.min(tl.where(mask, key, float("inf")), axis=0)
    high = tl.max(tl.where(mask, key, -float("inf")), axis=0)
    if keys.dtype.element_ty == tl.float32:
        tl.store(lowest + out, outwards(low, True), mask=channel < DIM)
        tl.store(highest + out, outwards(high, False), mask=channel < DIM)
    else:
        tl.store(lowest + out, low.to(lowest.dtype.element_ty), mask=channel < DIM)
        tl.store(highest + out, high.to(highest.dtype.element_ty), mask=channel < DIM)


@Remembered
@triton.jit(do_not_specialize=["pages"])
def score_kernel(
    query, lowest, highest, output, pages,
    stride_qb, stride_qh, stride_qd, stride_lb, stride_lh, stride_ls, stride_ld,
    stride_ub, stride_uh, stride_us, stride_ud,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the scores of `BLOCK_N` pages for the query heads of one KV head: the sum over channels of `q_c high_c`, or of
    `q_c low_c` where the query's sign bit is set.

    The bounds are read once for the whole group; a page without a token (its low above its high) scores `-inf`.
    """
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    page = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    mask = (page < pages)[:, None] & (channel < DIM)[None, :]
    at = page.to(tl.int64)[:, None]
    along = channel.to(tl.int64)[None, :]
    low = tl.load(
        lowest + batch * stride_lb + head * stride_lh + at * stride_ls + along * stride_ld, mask=mask, other=0.0
    ).to(tl.float32)
    high = tl.load(
        highest + batch * stride_ub + head * stride_uh + at * stride_us + along * stride_ud, mask=mask, other=0.0
    ).to(tl.float32)
    empty = tl.max((low > high).to(tl.int32), axis=1) > 0
    low = tl.where(empty[:, None], 0.0, low)
    high = tl.where(empty[:, None], 0.0, high)
    for member in range(GROUP):
        query_head = head * GROUP + member
        asked = tl.load(
            query + batch * stride_qb + query_head * stride_qh + channel.to(tl.int64) * stride_qd,
            mask=channel < DIM,
            other=0.0,
        ).to(tl.float32)[None, :]
        bound = tl.sum(asked * tl.where(asked.to(tl.int32, bitcast=True) < 0, low, high), axis=1)
        bound = tl.where(empty, -float("inf"), bound)
        tl.store(output + (batch * (KV_HEADS * GROUP) + query_head) * pages + page, bound, mask=page < pages)
