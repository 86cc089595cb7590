"""Triton kernels of eviction: the weakest slot of a head, and a token written over it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered

LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32
NOWHERE = tl.constexpr(2**63 - 1)


@Remembered
@triton.jit(do_not_specialize=["sinks_number", "first_recent_number", "slots", "stride_sh", "stride_ph"])
def weakest_kernel(
    scores, positions, sinks, first_recent, lengths, output,
    sinks_number, first_recent_number, slots,
    stride_sb, stride_sh, stride_ss, stride_pb, stride_ph, stride_ps,
    stride_ib, stride_ih, stride_rb, stride_rh, stride_lb, stride_lh,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the slot of one head that is the least by (score, position, slot); `-1` for a head without slots."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = sinks_number.to(tl.int64)
    if sinks is not None:
        first = tl.load(sinks + batch * stride_ib + head * stride_ih).to(tl.int64)
    recent = first_recent_number.to(tl.int64)
    if first_recent is not None:
        recent = tl.load(first_recent + batch * stride_rb + head * stride_rh).to(tl.int64)
    end = slots
    if lengths is not None:
        end = tl.load(lengths + batch * stride_lb + head * stride_lh).to(tl.int32)
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    place = tl.full([BLOCK_N], NOWHERE, tl.int64)  # position and slot of the least, in one number
    for begin in range(0, end, BLOCK_N):
        slot = begin + tl.arange(0, BLOCK_N)
        held = slot < end
        score = tl.load(scores + batch * stride_sb + head * stride_sh + slot.to(tl.int64) * stride_ss, mask=held)
        position = tl.load(positions + batch * stride_pb + head * stride_ph + slot.to(tl.int64) * stride_ps, mask=held)
        position = tl.where(held, position, 0).to(tl.int64)
        score = tl.where(score != score, -LARGEST, tl.minimum(tl.maximum(score, -LARGEST), LARGEST))
        protected = position < first
        if WINDOW:
            protected = protected | (position >= recent)
        score = tl.where(protected, float("inf"), score)
        score = tl.where(position < 0, -float("inf"), score)
        here = (tl.maximum(position, -1) + 1) * 4294967296 + slot
        better = held & ((score < least) | ((score == least) & (here < place)))
        least = tl.where(better, score, least)
        place = tl.where(better, here, place)
    lowest = tl.min(least, axis=0)
    best = tl.min(tl.where(least == lowest, place, NOWHERE), axis=0)
    tl.store(output + tl.program_id(0), tl.where(best == NOWHERE, -1, best % 4294967296))


@triton.jit
def write_row(column, row, at, source, exists, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of one column: number `at` of the column, from `source` elements behind `row`."""
    channel = tl.arange(0, BLOCK_D)
    held = (channel < DIM) & exists
    tl.store(column + at * DIM + channel, tl.load(row + source + channel, mask=held, other=0), mask=held)


@Remembered
@triton.jit(
    do_not_specialize=["slots", "number", "stride_0b", "stride_0h", "stride_1b", "stride_1h", "stride_2b", "stride_2h"]
)
def write_kernel(
    slot, number, starts, column_0, row_0, column_1, row_1, column_2, row_2, slots,
    stride_0b, stride_0h, stride_1b, stride_1h, stride_2b, stride_2h,
    HEADS: tl.constexpr, DIM_0: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
):  # fmt: skip
    """One program: the new row of one head in up to three columns, at a slot of its own or at `number`. A slot below 0 writes nothing."""
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // HEADS
    head = pair % HEADS
    place = number.to(tl.int64)
    if slot is not None:
        place = tl.load(slot + pair).to(tl.int64)
    exists = tl.full([1], 0, tl.int64) + place >= 0
    at = pair * slots + place
    if starts is not None:
        at = tl.load(starts + pair).to(tl.int64) + place
    write_row(column_0, row_0, at, batch * stride_0b + head * stride_0h, exists, DIM_0, BLOCK_0)
    if column_1 is not None:
        write_row(column_1, row_1, at, batch * stride_1b + head * stride_1h, exists, DIM_1, BLOCK_1)
    if column_2 is not None:
        write_row(column_2, row_2, at, batch * stride_2b + head * stride_2h, exists, DIM_2, BLOCK_2)
