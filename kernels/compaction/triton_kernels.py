"""Triton kernel of compaction: the kept rows of each head, one after the other."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered


@Remembered
@triton.jit(do_not_specialize=["kept", "stride_ih"])
def gather_kernel(
    source, index, output, kept,
    stride_sb, stride_sh, stride_ss, stride_sd, stride_ib, stride_ih, stride_is,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_N` kept rows of one head; a `-1` in the index gives a row of zeros."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    place = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    slot = tl.load(index + batch * stride_ib + head * stride_ih + place * stride_is, mask=place < kept, other=-1)
    slot = slot.to(tl.int64)
    at = batch * stride_sb + head * stride_sh + slot[:, None] * stride_ss + channel.to(tl.int64)[None, :] * stride_sd
    rows = tl.load(source + at, mask=(slot >= 0)[:, None] & (channel < DIM)[None, :], other=0)
    out = (tl.program_id(1).to(tl.int64) * kept + place)[:, None] * DIM + channel[None, :]
    tl.store(output + out, rows, mask=(place < kept)[:, None] & (channel < DIM)[None, :])
