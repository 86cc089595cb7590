"""Triton kernel of rotary position embedding (arXiv 2104.09864), rotate-half pairing: channel `d` with `d +
rotary_dim / 2`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered


@Remembered
@triton.jit(do_not_specialize=["slots", "stride_ch", "stride_ph", "stride_ob", "stride_oh"])
def rotate_kernel(
    source, cosine, sine, output, slots, sign,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_pb, stride_ph, stride_ps, stride_pd,
    stride_ob, stride_oh,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_N` slots of one head. Channels from `ROTARY` on pass through; `sign` -1 undoes a rotation."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    slot = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = (slot < slots) & (channel < DIM)
    turned = mask & (channel < ROTARY)
    partner = tl.where(channel < ROTARY // 2, channel + ROTARY // 2, channel - ROTARY // 2)
    base = source + batch * stride_xb + head * stride_xh + slot * stride_xs
    here = tl.load(base + channel * stride_xd, mask=mask, other=0.0).to(tl.float32)
    there = tl.load(base + partner * stride_xd, mask=turned, other=0.0).to(tl.float32)
    there = tl.where(channel < ROTARY // 2, -there, there)
    cos_at = cosine + batch * stride_cb + head * stride_ch + slot * stride_cs + channel * stride_cd
    sin_at = sine + batch * stride_pb + head * stride_ph + slot * stride_ps + channel * stride_pd
    cos = tl.load(cos_at, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_at, mask=turned, other=0.0).to(tl.float32) * sign
    out = batch * stride_ob + head * stride_oh + slot * DIM + channel
    tl.store(output + out, (here * cos + there * sin).to(output.dtype.element_ty), mask=mask)
