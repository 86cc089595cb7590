"""Triton kernel of the head vote: the softmax of every query head, summed over heads, from stored scores."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_launch import Remembered


@Remembered
@triton.jit(do_not_specialize=["slots", "query_heads", "rows", "parts"])
def vote_kernel(scores, lse, output, query_heads, rows, slots, parts, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: the votes of `BLOCK_N` slots of one batch row, in steps of `BLOCK_H` query heads.

    `lse` is `[parts, rows]`, of all query heads of the batch: the log-sum-exp over each part of the slots.
    """
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    votes = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, query_heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        row = batch * query_heads + head
        highest = tl.full([BLOCK_H], -float("inf"), tl.float32)
        for part in range(parts):
            of_part = tl.load(lse + part * rows + row, mask=head < query_heads, other=-float("inf"))
            highest = tl.maximum(highest, of_part, propagate_nan=tl.PropagateNan.ALL)
        anchor = tl.where(highest == -float("inf"), 0.0, highest)
        total = tl.zeros([BLOCK_H], tl.float32)
        for part in range(parts):
            of_part = tl.load(lse + part * rows + row, mask=head < query_heads, other=-float("inf"))
            total += tl.exp(of_part - anchor)
        shift = anchor + tl.log(tl.where(total == 0, 1.0, total))
        score = tl.load(
            scores + row[:, None] * slots + slot[None, :],
            mask=(head < query_heads)[:, None] & (slot < slots)[None, :],
            other=-float("inf"),
        )
        votes += tl.sum(tl.exp(score - shift[:, None]), axis=0)
    tl.store(output + batch * slots + slot, votes, mask=slot < slots)
