"""Triton kernels of attention over slots: the pass over a part of the context, and the merge of the parts."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import torch
import triton
import triton.language as tl

from kvpress.kernels.triton_blocks import FAR, LOG2E, listed_slots, query_tile, tile_scores
from kvpress.kernels.triton_launch import Remembered
from kvpress.kernels.triton_support import timed

SCAN = tl.constexpr(512)  # positions looked at at once to find where a block of rows may stop
DEEP = triton.Config({"BLOCK_N": 128}, num_warps=4, num_stages=3)
AHEAD = triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=3)
NARROW = triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=2)
MANY_WARPS = triton.Config({"BLOCK_N": 64}, num_warps=8, num_stages=2)
BROAD = triton.Config({"BLOCK_N": 128}, num_warps=8, num_stages=2)
SHORT = triton.Config({"BLOCK_N": 32}, num_warps=4, num_stages=2)
SHORTEST = triton.Config({"BLOCK_N": 16}, num_warps=4, num_stages=2)
SHARED_OUT = triton.Config({"BLOCK_N": 32}, num_warps=8, num_stages=2)
THIN = triton.Config({"BLOCK_N": 16}, num_warps=8, num_stages=2)
CONFIGS = [DEEP, AHEAD, NARROW, MANY_WARPS, BROAD, SHORT, SHORTEST, SHARED_OUT, THIN]
KEY = ["GROUP", "BLOCK_M", "BLOCK_D", "BLOCK_V", "SPLIT", "CAUSAL", "ROTARY", "UNIT"]


def choices(
    block_m: int,
    block_d: int,
    block_v: int,
    *,
    full: bool,
    amd: bool,
    hopper: bool,
    item: int,
    rotates: bool,
    listed: bool,
) -> list[triton.Config]:
    """Configurations that compile without a spill, best guess first.

    Args:
        full: fp32 arithmetic.
        amd, hopper: an AMD GPU; an NVIDIA GPU of compute capability 9 or later. Neither: an earlier one of NVIDIA's.
        item: bytes of a stored number.
        rotates: keys are turned as they are read.
        listed: slots are read by an index list.
    """
    wide = block_d + block_v > 256
    packed = item == 1
    if amd and not full:
        return [SHORT] if wide else [NARROW, SHORT]
    if rotates and not amd and (wide or (full and block_d > 64)):
        return [THIN]  # turning takes registers, and shared memory for the other half of each key
    if full and wide:
        return [THIN] if listed and not amd else [SHORTEST]
    if full:
        return [SHORT]
    if wide:
        return [SHARED_OUT] if packed and listed and block_m > 16 else [MANY_WARPS]
    if block_m > 16:
        strained = (packed and rotates) if hopper else (packed or rotates)  # more registers than four warps have
        if block_d > 64 and strained:
            return [SHARED_OUT]
        return [NARROW, SHORT] if hopper and item == 2 and not (rotates or listed) else [SHORT]
    if rotates:
        return [SHORT] if packed and block_d > 64 else [NARROW, SHORT]
    return [DEEP, NARROW, SHORT] if item == 2 else [AHEAD, BROAD, NARROW]


def situation(arguments, amd, hopper):
    """The arguments of `choices` for a launch."""
    return dict(
        block_m=arguments["BLOCK_M"], block_d=arguments["BLOCK_D"], block_v=arguments["BLOCK_V"],
        full=arguments["ARITHMETIC"] == tl.float32, amd=amd, hopper=hopper, item=arguments["keys"].element_size(),
        rotates=arguments["ROTARY"] > 0, listed=arguments["index"] is not None,
    )  # fmt: skip


def prune(configs, _, **arguments):
    """What the autotuner is to time: nothing in the interpreter, where the first choice is taken."""
    amd = bool(torch.version.hip)
    hopper = not amd and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return timed(choices(**situation(arguments, amd, hopper)))


@Remembered
@triton.autotune(CONFIGS, KEY, prune_configs_by={"early_config_prune": prune})
@triton.jit(do_not_specialize=["rows", "entries", "splits", "stride_ih", "stride_ph", "stride_rb"])
def attend_kernel(
    query, keys, values, keys_scale, values_scale, positions, query_positions, starts, lengths, index, sinks,
    cosine, sine, output, lse, scores_out,
    scaling, softcap, rows, entries, splits,
    stride_qb, stride_qh, stride_qr, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_xb, stride_xh, stride_xs,
    stride_yb, stride_yh, stride_ys,
    stride_pb, stride_ph, stride_ps,
    stride_ib, stride_ih, stride_is,
    stride_rb, stride_rr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, BY_ENTRY: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, SKIP: tl.constexpr, ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_M` of the rows of the query heads of one KV head, packed as `row * GROUP + head`, and one
    split of its slots. Strides of keys and values but for their channels are in units of `UNIT` elements.
    """
    part = tl.program_id(2)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)

    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (packed // GROUP).to(tl.int64)
    query_head = head * GROUP + packed % GROUP
    row_held = row < rows
    value_channel = tl.arange(0, BLOCK_V)

    query_at = query + batch * stride_qb + query_head[:, None] * stride_qh + row[:, None] * stride_qr
    asked = 0
    if BLOCK_D == CHUNK_D:
        asked = query_tile(query_at, tl.arange(0, BLOCK_D), row_held, stride_qd, DIM, ARITHMETIC)

    row_position = tl.full([BLOCK_M], FAR, tl.int32)
    if CAUSAL:
        row_position = tl.load(query_positions + batch * stride_rb + row * stride_rr, mask=row_held, other=-1).to(
            tl.int32
        )
    last_position = tl.max(row_position, axis=0)

    index_base = batch * stride_ib + head * stride_ih
    positions_base = batch * stride_pb + head * stride_ph
    RAGGED: tl.constexpr = starts is not None
    length = entries
    if RAGGED:
        first_slot = tl.load(starts + batch * KV_HEADS + head).to(tl.int64)
        length = tl.load(lengths + batch * KV_HEADS + head).to(tl.int32)
        keys += first_slot * stride_ks * UNIT
        values += first_slot * stride_vs * UNIT
        if keys_scale is not None:
            keys_scale += first_slot * stride_xs
        if values_scale is not None:
            values_scale += first_slot * stride_ys
    else:
        keys += (batch * stride_kb + head * stride_kh) * UNIT
        values += (batch * stride_vb + head * stride_vh) * UNIT
        if keys_scale is not None:
            keys_scale += batch * stride_xb + head * stride_xh
        if values_scale is not None:
            values_scale += batch * stride_yb + head * stride_yh
    count = length
    if index is not None:
        count = entries
    share = tl.cdiv(tl.cdiv(count, splits), BLOCK_N) * BLOCK_N
    begin = part * share
    end = tl.minimum(begin + share, count)

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if SKIP:  # entries after the last one that the block's rows may see are not read
        seen_end = begin
        for first in range(begin, end, SCAN):
            entry = first + tl.arange(0, SCAN)
            _, position = listed_slots(
                index, positions, entry, end, length, index_base, positions_base, stride_is, stride_ps, RAGGED
            )
            seen = (position >= 0) & (position <= last_position)
            seen_end = tl.maximum(seen_end, tl.max(tl.where(seen, entry + 1, 0), axis=0))
        end = seen_end
    for first in range(begin, end, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        slot, position = listed_slots(
            index, positions, entry, end, length, index_base, positions_base, stride_is, stride_ps, RAGGED
        )
        held = position >= 0
        visible = held[None, :] & row_held[:, None]
        if CAUSAL:
            visible = visible & (position[None, :] <= row_position[:, None])
        place = entry if BY_ENTRY else position
        scale_at = None if keys_scale is None else keys_scale + slot * stride_xs
        scores = tile_scores(
            asked, query_at, keys + slot[None, :] * stride_ks * UNIT, scale_at, row_held, held, stride_qd, stride_kd, scaling, softcap,
            place, cosine, sine, ROTARY, DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, ARITHMETIC, PRECISION,
        )  # fmt: skip
        scores = tl.where(visible, scores, -float("inf"))
        if scores_out is not None:  # a single row: for the weights, once the sums are known
            tl.store(
                scores_out + (batch * (KV_HEADS * GROUP) + query_head)[:, None] * entries + entry[None, :],
                scores,
                mask=row_held[:, None] & (entry < end)[None, :],
            )
        peak = tl.maximum(highest, tl.max(scores, axis=1))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp2((scores - anchor[:, None]) * LOG2E)
        fade = tl.exp2((highest - anchor) * LOG2E)
        total = total * fade + tl.sum(weights, axis=1)
        value = tl.load(
            values + slot[:, None] * stride_vs * UNIT + value_channel[None, :].to(tl.int64) * stride_vd,
            mask=held[:, None] & (value_channel[None, :] < VALUE_DIM),
            other=0,
        )
        if values_scale is not None:  # into the weights: there are fewer of them than numbers in the rows
            weights = weights * tl.load(values_scale + slot * stride_ys, mask=held, other=0.0)[None, :]
        weighted = weighted * fade[:, None]
        weighted = tl.dot(weights.to(ARITHMETIC), value.to(ARITHMETIC), weighted, input_precision=PRECISION)
        highest = peak

    some = total > 0
    divisor = tl.where(some, total, 1.0)
    result = weighted / divisor[:, None]
    log_sum = tl.where(some, highest + tl.log(divisor), -float("inf"))
    if not SPLIT:
        if sinks is not None:
            sink = tl.load(sinks + query_head, mask=row_held, other=0.0).to(tl.float32)
            peak = tl.maximum(log_sum, sink)
            peak = tl.where(peak == -float("inf"), 0.0, peak)
            with_sink = tl.exp(log_sum - peak) + tl.exp(sink - peak)
            with_sink = tl.where(with_sink > 0, peak + tl.log(with_sink), -float("inf"))
            result = result * tl.exp(log_sum - tl.where(some, with_sink, 0.0))[:, None]
            log_sum = with_sink
    batches = tl.num_programs(1) // KV_HEADS
    out_row = ((part * batches + batch) * (KV_HEADS * GROUP) + query_head) * rows + row
    tl.store(lse + out_row, log_sum, mask=row_held)
    tl.store(
        output + out_row[:, None] * VALUE_DIM + value_channel[None, :],
        result.to(output.dtype.element_ty),
        mask=row_held[:, None] & (value_channel[None, :] < VALUE_DIM),
    )


@Remembered
@triton.jit(do_not_specialize=["total_rows", "rows", "splits"])
def merge_kernel(
    partial_output, partial_lse, sinks, output, lse, total_rows, rows, splits,
    QUERY_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: one output row from its `splits` partial rows, weighted by `exp(partial_lse - lse)`."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_V)
    parts = tl.load(partial_lse + part.to(tl.int64) * total_rows + row, mask=part < splits, other=-float("inf"))
    peak = tl.max(parts, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + (row // rows) % QUERY_HEADS).to(tl.float32)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp(parts - peak), axis=0)
    if sinks is not None:
        total += tl.exp(sink - peak)
    log_sum = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    anchor = tl.where(total > 0, log_sum, 0.0)
    merged = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        at = row + total_rows.to(tl.int64) * split
        weight = tl.exp(tl.load(partial_lse + at) - anchor)
        merged += weight * tl.load(partial_output + at * VALUE_DIM + channel, mask=channel < VALUE_DIM, other=0.0)
    tl.store(lse + row, log_sum)
    tl.store(output + row * VALUE_DIM + channel, merged.to(output.dtype.element_ty), mask=channel < VALUE_DIM)


@Remembered
@triton.jit(do_not_specialize=["entries"])
def weights_kernel(
    scores, lse, lengths, output, entries,
    GROUP: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: `exp(score - lse)` of a block of entries, reduced over the query heads of one KV head."""
    kv_head = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.arange(0, BLOCK_G)
    count = entries
    if lengths is not None:
        count = tl.load(lengths + kv_head).to(tl.int32)
    query_head = kv_head * GROUP + member
    log_sum = tl.load(lse + query_head, mask=member < GROUP, other=-float("inf"))
    score = tl.load(
        scores + query_head[:, None] * entries + entry[None, :],
        mask=(member < GROUP)[:, None] & (entry < count)[None, :],
        other=-float("inf"),
    )
    weight = tl.exp(score - tl.where(log_sum == -float("inf"), 0.0, log_sum)[:, None])
    if REDUCTION == "max":
        reduced = tl.max(weight, axis=0)
    else:
        reduced = tl.sum(weight, axis=0)
    if REDUCTION == "mean":
        reduced = reduced / GROUP
    tl.store(output + kv_head * entries + entry, reduced, mask=entry < entries)
