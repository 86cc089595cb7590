"""Triton kernels of attention mass: the log-sum-exp of every row, then the column sums of `exp(score - lse)`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import torch
import triton
import triton.language as tl

from kvpress.kernels.triton_blocks import FAR, LOG2E, gumbel, listed_slots, query_tile, tile_scores
from kvpress.kernels.triton_launch import Remembered
from kvpress.kernels.triton_support import timed

SCAN = tl.constexpr(512)  # positions looked at at once to find where the visible rows begin, or the visible slots end
DEEP = triton.Config({"BLOCK_N": 128}, num_warps=4, num_stages=3)
AHEAD = triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=3)
NARROW = triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=2)
SHORT = triton.Config({"BLOCK_N": 32}, num_warps=4, num_stages=2)
CONFIGS = [DEEP, AHEAD, NARROW, SHORT]
KEY = ["GROUP", "BLOCK_M", "BLOCK_D", "CAUSAL", "UNIT"]


def choices(block_m: int, block_d: int, full: bool, amd: bool) -> list[triton.Config]:
    """Configurations that compile without a spill, best guess first; `full`: fp32 arithmetic."""
    if full or (amd and block_d > 128):
        return [SHORT]
    if amd:
        return [NARROW, SHORT]
    if block_m <= 16 and block_d <= 128:
        return [DEEP, NARROW]
    return [AHEAD, NARROW]


def prune(configs, _, **arguments):
    """What the autotuner is to time: nothing in the interpreter, where the first choice is taken."""
    blocks = arguments["BLOCK_M"], arguments["BLOCK_D"]
    return timed(choices(*blocks, arguments["ARITHMETIC"] == tl.float32, bool(torch.version.hip)))


@triton.jit
def slots_of(starts, lengths, pair, entries):
    """Where the slots of a batch row and KV head begin, and how many they are: in the dense layout strides alone say where, in the flat one
    those of rows and heads are 0.
    """
    if starts is not None:
        first_slot = tl.load(starts + pair).to(tl.int64)
        length = tl.load(lengths + pair).to(tl.int32)
    else:
        first_slot = 0
        length = entries
    return first_slot, length


@Remembered
@triton.autotune(CONFIGS, KEY, prune_configs_by={"early_config_prune": prune})
@triton.jit(do_not_specialize=["rows", "entries", "splits", "noise_base", "stride_ph", "stride_rb"])
def lse_kernel(
    query, keys, keys_scale, positions, query_positions, starts, lengths, lse, scores_out,
    scaling, softcap, noise_base, coolness, rows, entries, splits,
    stride_qb, stride_qh, stride_qr, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_xb, stride_xh, stride_xs,
    stride_pb, stride_ph, stride_ps,
    stride_rb, stride_rr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr,
    ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_M` packed rows (`row * GROUP + head`) of one KV head over one split of its slots.

    A single row also stores its scores, so that the column sums need not read the keys again. Strides of keys but for their channels are in
    units of `UNIT` elements.
    """
    part = tl.program_id(2)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (packed // GROUP).to(tl.int64)
    query_head = head * GROUP + packed % GROUP
    row_held = row < rows

    query_at = query + batch * stride_qb + query_head[:, None] * stride_qh + row[:, None] * stride_qr
    asked = 0
    if BLOCK_D == CHUNK_D:
        asked = query_tile(query_at, tl.arange(0, BLOCK_D), row_held, stride_qd, DIM, ARITHMETIC)
    row_position = tl.full([BLOCK_M], FAR, tl.int32)
    row_place = row
    if query_positions is not None:
        row_place = tl.load(query_positions + batch * stride_rb + row * stride_rr, mask=row_held, other=-1)
    if CAUSAL:
        row_position = row_place.to(tl.int32)
    last_position = tl.max(row_position, axis=0)

    positions_base = batch * stride_pb + head * stride_ph
    RAGGED: tl.constexpr = starts is not None
    first_slot, length = slots_of(starts, lengths, batch * KV_HEADS + head, entries)
    keys += (batch * stride_kb + head * stride_kh + first_slot * stride_ks) * UNIT
    if keys_scale is not None:
        keys_scale += batch * stride_xb + head * stride_xh + first_slot * stride_xs
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = part * share
    end = tl.minimum(begin + share, length)
    if SKIP:  # slots after the last one that the block's rows may see are not read
        seen_end = begin
        for first in range(begin, end, SCAN):
            entry = first + tl.arange(0, SCAN)
            _, position = listed_slots(None, positions, entry, end, length, 0, positions_base, 0, stride_ps, RAGGED)
            seen = (position >= 0) & (position <= last_position)
            seen_end = tl.maximum(seen_end, tl.max(tl.where(seen, entry + 1, 0), axis=0))
        end = seen_end

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        slot, position = listed_slots(None, positions, entry, end, length, 0, positions_base, 0, stride_ps, RAGGED)
        held = position >= 0
        visible = held[None, :] & row_held[:, None]
        if CAUSAL:
            visible = visible & (position[None, :] <= row_position[:, None])
        scale_at = None if keys_scale is None else keys_scale + slot * stride_xs
        scores = tile_scores(
            asked, query_at, keys + slot[None, :] * stride_ks * UNIT, scale_at, row_held, held, stride_qd, stride_kd, scaling, softcap,
            0, None, None, 0, DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, ARITHMETIC, PRECISION,
        )  # fmt: skip
        if noise_base is not None:
            key_place = slot if positions is None else position
            scores += gumbel(noise_base, query_head, row_place, key_place)
        scores = tl.where(visible, scores * coolness, -float("inf"))
        if scores_out is not None:
            tl.store(
                scores_out + (batch * (KV_HEADS * GROUP) + query_head)[:, None] * entries + entry[None, :],
                scores,
                mask=row_held[:, None] & (entry < end)[None, :],
            )
        peak = tl.maximum(highest, tl.max(scores, axis=1))
        anchor = tl.where(peak == -float("inf"), 0.0, peak)
        fade = tl.exp2((highest - anchor) * LOG2E)
        total = total * fade + tl.sum(tl.exp2((scores - anchor[:, None]) * LOG2E), axis=1)
        highest = peak
    some = total > 0
    log_sum = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), -float("inf"))
    batches = tl.num_programs(1) // KV_HEADS
    tl.store(lse + ((part * batches + batch) * (KV_HEADS * GROUP) + query_head) * rows + row, log_sum, mask=row_held)


@Remembered
@triton.autotune(CONFIGS, KEY, prune_configs_by={"early_config_prune": prune})
@triton.jit(do_not_specialize=["rows", "entries", "noise_base", "stride_ph", "stride_rb"])
def column_kernel(
    query, keys, keys_scale, positions, query_positions, starts, lengths, lse, output,
    scaling, softcap, noise_base, coolness, rows, entries,
    stride_qb, stride_qh, stride_qr, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_xb, stride_xh, stride_xs,
    stride_pb, stride_ph, stride_ps,
    stride_rb, stride_rr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr,
    ARITHMETIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the sums of `BLOCK_N` slots of one KV head, over all rows, for each head of its group (padded to
    `BLOCK_G`).
    """
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    ROWS: tl.constexpr = BLOCK_M // BLOCK_G
    packed = tl.arange(0, BLOCK_M)
    member = packed % BLOCK_G
    query_head = head * GROUP + member

    positions_base = batch * stride_pb + head * stride_ph
    RAGGED: tl.constexpr = starts is not None
    first_slot, length = slots_of(starts, lengths, batch * KV_HEADS + head, entries)
    keys += (batch * stride_kb + head * stride_kh + first_slot * stride_ks) * UNIT
    if keys_scale is not None:
        keys_scale += batch * stride_xb + head * stride_xh + first_slot * stride_xs
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot, position = listed_slots(None, positions, entry, length, length, 0, positions_base, 0, stride_ps, RAGGED)
    held = position >= 0

    begin = 0
    if SKIP:  # rows before the first one that sees a slot of this block are not read
        first_position = tl.min(tl.where(held, position, FAR), axis=0)
        begin = rows
        for first in range(0, rows, SCAN):
            row = first + tl.arange(0, SCAN)
            seen = tl.load(
                query_positions + batch * stride_rb + row.to(tl.int64) * stride_rr, mask=row < rows, other=-1
            )
            begin = tl.minimum(begin, tl.min(tl.where(seen >= first_position, row, rows), axis=0))

    sums = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    for first in range(begin, rows, ROWS):
        row = (first + packed // BLOCK_G).to(tl.int64)
        row_held = (row < rows) & (member < GROUP)
        query_at = query + batch * stride_qb + query_head[:, None] * stride_qh + row[:, None] * stride_qr
        asked = 0
        if BLOCK_D == CHUNK_D:
            asked = query_tile(query_at, tl.arange(0, BLOCK_D), row_held, stride_qd, DIM, ARITHMETIC)
        visible = held[None, :] & row_held[:, None]
        row_place = row
        if query_positions is not None:
            row_place = tl.load(query_positions + batch * stride_rb + row * stride_rr, mask=row_held, other=-1)
        if CAUSAL:
            visible = visible & (position[None, :] <= row_place.to(tl.int32)[:, None])
        scale_at = None if keys_scale is None else keys_scale + slot * stride_xs
        scores = tile_scores(
            asked, query_at, keys + slot[None, :] * stride_ks * UNIT, scale_at, row_held, held, stride_qd, stride_kd, scaling, softcap,
            0, None, None, 0, DIM, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, ARITHMETIC, PRECISION,
        )  # fmt: skip
        if noise_base is not None:
            key_place = slot if positions is None else position
            scores += gumbel(noise_base, query_head, row_place, key_place)
        log_sum = tl.load(
            lse + (batch * (KV_HEADS * GROUP) + query_head) * rows + row, mask=row_held, other=float("inf")
        )
        visible = visible & (log_sum > -float("inf"))[:, None]
        weights = tl.where(visible, tl.exp2((scores * coolness - log_sum[:, None]) * LOG2E), 0.0)
        sums += tl.sum(tl.reshape(weights, (ROWS, BLOCK_G, BLOCK_N)), axis=0)
    group_member = tl.arange(0, BLOCK_G)
    out_head = batch * (KV_HEADS * GROUP) + head * GROUP + group_member
    tl.store(
        output + out_head[:, None] * entries + entry[None, :],
        sums,
        mask=(group_member < GROUP)[:, None] & (entry < entries)[None, :],
    )
