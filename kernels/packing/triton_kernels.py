"""Triton kernels of packing: rows rounded to int8 or int4, each with its scale behind it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered

LEVELS = tl.constexpr(127.0)
INT4_LEVELS = tl.constexpr(7.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal number of fp32
HALVES = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to an integer, halves to the even one


@triton.jit
def rounded(value, levels):
    """Codes and scales of rows `[rows, channels]`; what is no number has code 0."""
    unknown = tl.max((value != value).to(tl.int32), axis=1) > 0
    scale = tl.div_rn(tl.max(tl.abs(value), axis=1), levels)
    scale = tl.where(unknown, float("nan"), scale)
    divisor = tl.where(scale < TINY, TINY, scale)
    code = tl.div_rn(value, tl.broadcast_to(divisor[:, None], value.shape))
    code = (code + HALVES) - HALVES
    return tl.where(code == code, code, 0.0), scale


@triton.jit
def mixed_channels(value, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums and differences of channels at distances 1, 2, 4, … of `STEPS`."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(value, [BLOCK_N, BLOCK_D >> (step + 1), 2, 1 << step])
        first, second = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
        pairs = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
        value = tl.reshape(pairs, [BLOCK_N, BLOCK_D])
    return value


@triton.jit
def rows_of(
    rows, count, heads, stride_rb, stride_rh, stride_rs, stride_rd,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The `BLOCK_N` rows of this program's batch row and head `[rows, channels]`, in fp32, and their numbers."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    held = (row < count)[:, None] & (channel < DIM)[None, :]
    at = batch * stride_rb + head * stride_rh + row[:, None] * stride_rs + channel[None, :].to(tl.int64) * stride_rd
    return tl.load(rows + at, mask=held, other=0.0).to(tl.float32), row


@triton.jit
def store(codes, scales, code, scale, row, count, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of `BYTES` codes, each with its scale behind it; `codes` and `scales` are two views of the packed rows."""
    out = tl.program_id(1).to(tl.int64) * count + row
    byte = tl.arange(0, BLOCK)
    held = (row < count)[:, None] & (byte < BYTES)[None, :]
    tl.store(codes + out[:, None] * (BYTES + 4) + byte[None, :], code.to(codes.dtype.element_ty), mask=held)
    tl.store(scales + out * (BYTES // 4 + 1) + BYTES // 4, scale, mask=row < count)


@Remembered
@triton.jit(do_not_specialize=["count", "stride_rh", "stride_rb"])
def pack_kernel(
    rows, codes, scales, count, heads,
    stride_rb, stride_rh, stride_rs, stride_rd,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_N` rows of one batch row and head, as int8."""
    value, row = rows_of(rows, count, heads, stride_rb, stride_rh, stride_rs, stride_rd, DIM, BLOCK_N, BLOCK_D)
    code, scale = rounded(value, LEVELS)
    store(codes, scales, code, scale, row, count, DIM, BLOCK_D)


@Remembered
@triton.jit(do_not_specialize=["count", "stride_rh", "stride_rb"])
def pack_int4_kernel(
    rows, centre, codes, scales, count, heads,
    stride_rb, stride_rh, stride_rs, stride_rd,
    DIM: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `pack_kernel`, as int4, of rows less the centre of their head, whose channels are mixed."""
    value, row = rows_of(rows, count, heads, stride_rb, stride_rh, stride_rs, stride_rd, DIM, BLOCK_N, BLOCK_D)
    if centre is not None:
        channel = tl.arange(0, BLOCK_D)
        value -= tl.load(centre + tl.program_id(1).to(tl.int64) * DIM + channel, mask=channel < DIM, other=0.0)[None, :]
    code, scale = rounded(mixed_channels(value, STEPS, BLOCK_N, BLOCK_D), INT4_LEVELS)
    even, odd = tl.split(tl.reshape((code + 8.0).to(tl.int32), [BLOCK_N, BLOCK_D // 2, 2]))
    store(codes, scales, even | (odd << 4), scale * (1.0 / (1 << STEPS)), row, count, DIM // 2, BLOCK_D // 2)
