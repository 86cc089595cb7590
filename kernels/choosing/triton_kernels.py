"""Triton kernels of choosing: how close a query is to the one that chose, and lists of slots."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered

LEAST = tl.constexpr(
    1e-8
)  # what is taken for the length of a shorter vector, as torch.nn.functional.cosine_similarity does


@Remembered
@triton.jit(do_not_specialize=["length", "stride_qb", "stride_fb"])
def cosine_kernel(
    query, former, live, output, length, stride_qb, stride_qh, stride_qd, stride_fb, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: the cosine of a batch row's query and its former query, all heads together, in fp64; -inf where no row is live."""
    row = tl.program_id(0).to(tl.int64)
    both = tl.zeros([BLOCK], tl.float64)
    ours = tl.zeros([BLOCK], tl.float64)
    theirs = tl.zeros([BLOCK], tl.float64)
    for first in range(0, length, BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)
        place = row * stride_qb + (at // DIM) * stride_qh + (at % DIM) * stride_qd
        asked = tl.load(query + place, mask=at < length, other=0.0).to(tl.float64)
        before = tl.load(former + row * stride_fb + at, mask=at < length, other=0.0).to(tl.float64)
        both += asked * before
        ours += asked * asked
        theirs += before * before
    lengths = tl.maximum(tl.sqrt(tl.sum(ours, axis=0)), LEAST) * tl.maximum(tl.sqrt(tl.sum(theirs, axis=0)), LEAST)
    held = tl.load(live + row).to(tl.int32) != 0
    tl.store(output + row, tl.where(held, tl.sum(both, axis=0) / lengths, -float("inf")))


@Remembered
@triton.jit(do_not_specialize=["chosen_count", "sinks", "local", "slots", "stride_cb", "stride_ch"])
def list_kernel(
    chosen, output, chosen_count, sinks, local, slots, stride_cb, stride_ch, stride_cn,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK` entries of one list: the first slots, those chosen, the last slots."""
    pair = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = sinks + chosen_count + local
    inside = (entry >= sinks) & (entry < sinks + chosen_count)
    at = chosen + (pair // HEADS) * stride_cb + (pair % HEADS) * stride_ch + (entry - sinks).to(tl.int64) * stride_cn
    listed = tl.load(at, mask=inside, other=0)
    ends = tl.where(entry < sinks, entry, slots - count + entry).to(tl.int64)
    tl.store(output + pair * count + entry, tl.where(inside, listed, ends), mask=entry < count)
