"""Triton kernels of pages: the bounds of the keys of each page, and the upper bound of a query's score over a page."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_best import least_taken, taken
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


@triton.jit
def bounds_of(
    lowest, highest, page, held, channel, stride_ls, stride_ld, stride_us, stride_ud, DIM: tl.constexpr
):  # fmt: skip
    """Low and high of each page `[pages, channels]` in fp32, 0 where a page has no token (its low above its high); and which have none."""
    mask = held[:, None] & (channel < DIM)[None, :]
    at = page.to(tl.int64)[:, None]
    along = channel.to(tl.int64)[None, :]
    low = tl.load(lowest + at * stride_ls + along * stride_ld, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(highest + at * stride_us + along * stride_ud, mask=mask, other=0.0).to(tl.float32)
    empty = tl.max((low > high).to(tl.int32), axis=1) > 0
    return tl.where(empty[:, None], 0.0, low), tl.where(empty[:, None], 0.0, high), empty


@triton.jit
def highest_products(query_at, channel, stride_qd, low, high, DIM: tl.constexpr):
    """The most that the product of a query with a key within the bounds of each page can be: the sum over channels of `q_c high_c`, or of
    `q_c low_c` where the query's sign bit is set.
    """
    asked = tl.load(query_at + channel.to(tl.int64) * stride_qd, mask=channel < DIM, other=0.0).to(tl.float32)[None, :]
    return tl.sum(asked * tl.where(asked.to(tl.int32, bitcast=True) < 0, low, high), axis=1)


@Remembered
@triton.jit(do_not_specialize=["pages"])
def score_kernel(
    query, lowest, highest, output, pages,
    stride_qb, stride_qh, stride_qd, stride_lb, stride_lh, stride_ls, stride_ld,
    stride_ub, stride_uh, stride_us, stride_ud,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the scores of `BLOCK_N` pages for the query heads of one KV head, `-inf` for a page without a token. The bounds are read
    once for the whole group.
    """
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    page = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    lowest += batch * stride_lb + head * stride_lh
    highest += batch * stride_ub + head * stride_uh
    low, high, empty = bounds_of(
        lowest, highest, page, page < pages, channel, stride_ls, stride_ld, stride_us, stride_ud, DIM
    )
    for member in range(GROUP):
        query_head = head * GROUP + member
        query_at = query + batch * stride_qb + query_head * stride_qh
        bound = highest_products(query_at, channel, stride_qd, low, high, DIM)
        bound = tl.where(empty, -float("inf"), bound)
        tl.store(output + (batch * (KV_HEADS * GROUP) + query_head) * pages + page, bound, mask=page < pages)


@triton.jit
def widened(bound, key, begins, BELOW: tl.constexpr):
    """A bound of a page that `key`, in fp32, joins, or with which it `begins`; in the type of the bound."""
    wide = bound.to(tl.float32)
    beyond = key < wide if BELOW else key > wide
    if bound.dtype == tl.bfloat16:
        rounded = outwards(key, BELOW)
    else:
        rounded = key.to(bound.dtype)
    return tl.where(begins | beyond | (key != key), rounded, bound)


@Remembered
@triton.jit(do_not_specialize=["slots"])
def follow_kernel(
    query, lowest, highest, keys, keys_scale, output, slots,
    stride_qb, stride_qh, stride_qd, stride_lb, stride_lh, stride_ls, stride_ld,
    stride_ub, stride_uh, stride_us, stride_ud, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_xb, stride_xh, stride_xs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the key in slot `slots - 1` widens the bounds of its page, which scores `+inf`; `BLOCK_N` pages score the most that any
    query head of the KV head may find there, `-inf` where that is no number or the page has no token.
    """
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    last = (slots - 1) // PAGE
    channel = tl.arange(0, BLOCK_D)
    along = channel.to(tl.int64)
    lowest += batch * stride_lb + head * stride_lh
    highest += batch * stride_ub + head * stride_uh
    page = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high, empty = bounds_of(
        lowest, highest, page, page < last, channel, stride_ls, stride_ld, stride_us, stride_ud, DIM
    )
    most = tl.full([BLOCK_N], -float("inf"), tl.float32)
    unknown = empty
    for member in range(GROUP):
        query_at = query + batch * stride_qb + (head * GROUP + member) * stride_qh
        bound = highest_products(query_at, channel, stride_qd, low, high, DIM)
        unknown = unknown | (bound != bound)
        most = tl.maximum(most, bound)
    most = tl.where(page == last, float("inf"), tl.where(unknown, -float("inf"), most))
    tl.store(output + tl.program_id(1).to(tl.int64) * (last + 1) + page, most, mask=page <= last)
    if last // BLOCK_N == tl.program_id(0):
        held = channel < DIM
        newest = (slots - 1).to(tl.int64)
        key = tl.load(
            keys + batch * stride_kb + head * stride_kh + newest * stride_ks + along * stride_kd, mask=held, other=0.0
        ).to(tl.float32)
        if keys_scale is not None:
            key = key * tl.load(keys_scale + batch * stride_xb + head * stride_xh + newest * stride_xs)
        begins = (slots - 1) % PAGE == 0
        low_at = lowest + last.to(tl.int64) * stride_ls + along * stride_ld
        high_at = highest + last.to(tl.int64) * stride_us + along * stride_ud
        tl.store(low_at, widened(tl.load(low_at, mask=held, other=0.0), key, begins, True), mask=held)
        tl.store(high_at, widened(tl.load(high_at, mask=held, other=0.0), key, begins, False), mask=held)


@Remembered
@triton.jit(do_not_specialize=["pages", "count", "slots"])
def list_pages_kernel(
    scores, output, pages, count, slots,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: slots of the `count` best pages of a KV head, ascending; `-1` past the last slot and where a page scores `-inf`."""
    pair = tl.program_id(0).to(tl.int64)
    scores += pair * pages
    output += pair * count * PAGE
    least, skipped = least_taken(scores, pages, count, BLOCK, ONCE)
    found, equals = 0, 0
    within = tl.arange(0, BLOCK_P)
    for first in range(0, pages, TILE):
        page = first + tl.arange(0, TILE)
        kept, equals = taken(scores, page, pages, least, skipped, equals)
        place = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        known = tl.load(scores + page, mask=kept, other=0.0) != -float("inf")
        slot = page[:, None] * PAGE + within[None, :]
        slot = tl.where(known[:, None] & (slot < slots), slot, -1)
        tl.store(
            output + place[:, None] * PAGE + within[None, :],
            slot.to(tl.int64),
            mask=kept[:, None] & (within < PAGE)[None, :],
        )
        found += tl.sum(kept.to(tl.int32))
