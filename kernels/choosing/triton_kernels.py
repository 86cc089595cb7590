"""Triton kernels of choosing: how close a query is to the one that chose, and lists of slots."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

from kvpress.kernels.triton_best import least_taken, taken
from kvpress.kernels.triton_launch import Remembered

LEAST = tl.constexpr(
    1e-8
)  # what is taken for the length of a shorter vector, as torch.nn.functional.cosine_similarity does


@Remembered
@triton.jit(do_not_specialize=["length", "stride_qb", "stride_fb"])
def cosine_kernel(
    query, former, live, output, voting, cosine, sine, length, stride_qb, stride_qh, stride_qd, stride_fb,
    DIM: tl.constexpr, ROTARY: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the cosine of a batch row's query and its former query, all heads together, in fp64; -inf where no row is live.

    With `voting`, that is also written: the query as it votes, turned by the tables `[ROTARY]` where they are given; with `KV_HEADS` > 0
    head `h` of the query goes with KV head `h % KV_HEADS`, and the `GROUP` heads of a KV head come together.
    """
    row = tl.program_id(0).to(tl.int64)
    query += row * stride_qb
    both = tl.zeros([BLOCK], tl.float64)
    ours = tl.zeros([BLOCK], tl.float64)
    theirs = tl.zeros([BLOCK], tl.float64)
    for first in range(0, length, BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)
        asked = tl.load(query + (at // DIM) * stride_qh + (at % DIM) * stride_qd, mask=at < length, other=0.0)
        asked = asked.to(tl.float64)
        before = tl.load(former + row * stride_fb + at, mask=at < length, other=0.0).to(tl.float64)
        both += asked * before
        ours += asked * asked
        theirs += before * before
    lengths = tl.maximum(tl.sqrt(tl.sum(ours, axis=0)), LEAST) * tl.maximum(tl.sqrt(tl.sum(theirs, axis=0)), LEAST)
    held = tl.load(live + row).to(tl.int32) != 0
    tl.store(output + row, tl.where(held, tl.sum(both, axis=0) / lengths, -float("inf")))
    if voting is not None:
        for first in range(0, length, BLOCK):
            at = (first + tl.arange(0, BLOCK)).to(tl.int64)
            head, channel = at // DIM, at % DIM
            if KV_HEADS > 0:
                head = head % GROUP * KV_HEADS + head // GROUP
            base = query + head * stride_qh
            here = tl.load(base + channel * stride_qd, mask=at < length, other=0.0).to(tl.float32)
            if cosine is not None:
                turned = (at < length) & (channel < ROTARY)
                partner = tl.where(channel < ROTARY // 2, channel + ROTARY // 2, channel - ROTARY // 2)
                there = tl.load(base + partner * stride_qd, mask=turned, other=0.0).to(tl.float32)
                there = tl.where(channel < ROTARY // 2, -there, there)
                cos = tl.load(cosine + channel, mask=turned, other=1.0).to(tl.float32)
                sin = tl.load(sine + channel, mask=turned, other=0.0).to(tl.float32)
                here = here * cos + there * sin
            tl.store(voting + row * length + at, here.to(voting.dtype.element_ty), mask=at < length)


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


@Remembered
@triton.jit(do_not_specialize=["slots", "count", "pieces"])
def best_kernel(
    scores, places, output, best, slots, count, pieces, BLOCK: tl.constexpr, ONCE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program: the places of the `count` highest scores of one of the `pieces` of a row, ascending; `best`, where it is given, are the
    scores there. With `places`, a score's place is what stands there.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin = piece * slots // pieces
    length = ((piece + 1) * slots // pieces - begin).to(tl.int32)
    scores += row * slots + begin
    output += (row * pieces + piece) * count
    least, skipped = least_taken(scores, length, count, BLOCK, ONCE)
    found, equals = 0, 0
    for first in range(0, length, TILE):
        at = first + tl.arange(0, TILE)
        kept, equals = taken(scores, at, length, least, skipped, equals)
        to = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        place = begin + at
        if places is not None:
            place = tl.load(places + row * slots + place, mask=kept, other=0)
        tl.store(output + to, place.to(tl.int64), mask=kept)
        if best is not None:
            tl.store(best + (row * pieces + piece) * count + to, tl.load(scores + at, mask=kept, other=0.0), mask=kept)
        found += tl.sum(kept.to(tl.int32))


@Remembered
@triton.jit(do_not_specialize=["length", "candidates", "count", "sinks", "local", "slots", "stride_qb"])
def choose_kernel(
    votes, places, cosines, query, former, live, chosen, output, threshold, length, candidates, count, sinks, local, slots,
    stride_qb, stride_qh, stride_qd,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr, TILE: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """One program: what one batch row attends to. Where its cosine does not reach the threshold, the `count` candidates with most votes
    are chosen, and the query is remembered. With `places`, the place of a candidate behind the sinks is what stands there.
    """
    row = tl.program_id(0).to(tl.int64)
    votes += row * candidates
    chosen += row * count
    output += row * (sinks + count + local)
    if tl.load(cosines + row) >= tl.load(threshold):
        for first in range(0, count, ENDS):
            entry = first + tl.arange(0, ENDS)
            tl.store(output + sinks + entry, tl.load(chosen + entry, mask=entry < count, other=0), mask=entry < count)
    else:
        least, skipped = least_taken(votes, candidates, count, BLOCK, ONCE)
        found, equals = 0, 0
        for first in range(0, candidates, TILE):
            at = first + tl.arange(0, TILE)
            kept, equals = taken(votes, at, candidates, least, skipped, equals)
            to = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            slot = (sinks + at).to(tl.int64)
            if places is not None:
                slot = sinks + tl.load(places + row * candidates + at, mask=kept, other=0)
            tl.store(chosen + to, slot, mask=kept)
            tl.store(output + sinks + to, slot, mask=kept)
            found += tl.sum(kept.to(tl.int32))
        for first in range(0, length, ENDS):
            at = (first + tl.arange(0, ENDS)).to(tl.int64)
            place = row * stride_qb + (at // DIM) * stride_qh + (at % DIM) * stride_qd
            tl.store(former + row * length + at, tl.load(query + place, mask=at < length, other=0.0), mask=at < length)
        tl.store(live + row, 1)
    for first in range(0, sinks, ENDS):
        entry = first + tl.arange(0, ENDS)
        tl.store(output + entry, entry.to(tl.int64), mask=entry < sinks)
    for first in range(0, local, ENDS):
        entry = first + tl.arange(0, ENDS)
        tl.store(output + sinks + count + entry, (slots - local + entry).to(tl.int64), mask=entry < local)
