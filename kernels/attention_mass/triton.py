"""Attention mass on GPUs: the launch of the Triton kernels. A single row reads the keys once, several rows read them
twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.attention_mass import triton_kernels
from kvpress.kernels.shapes import most_slots
from kvpress.kernels.triton_blocks import FULL, arithmetic, precision
from kvpress.kernels.triton_support import on_device, plan_splits, power_of_two, slot_strides, stride_unit, strides

LOW = 0xFFFFFFFF


def block_rows(packed: int, full: bool) -> int:
    """Packed query rows a program holds at once: at least the tensor cores' 16."""
    return min(16 if full else 64, max(16, power_of_two(packed)))


def attention_mass(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None = None,
    temperature: float = 1.0,
    noise_seed: int | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `kvpress.kernels.attention_mass.attention_mass`.

    Args:
        lse: `[batch, query_heads, rows]`, the log-sum-exp that attention returned for the same rows, which spares the
            first pass
            over the keys; only without noise and at temperature 1. It holds the sinks already.
        splits: parts of the context that programs of their own read in the first pass; `None`: as many as keep the
            GPU busy.
    """
    if lse is not None and (noise_seed is not None or temperature != 1.0):
        raise ValueError("lse can be given only without noise and at temperature 1: it belongs to the plain scores")
    rows = query.shape[2]
    kv_heads = starts.shape[1] if starts is not None else keys.shape[1]
    slots = most_slots(keys, lengths)
    mass = query.new_zeros(*query.shape[:2], slots, dtype=torch.float32)
    if mass.numel() == 0 or rows == 0:
        return mass
    options: dict[str, Any] = dict(
        scaling=scaling, positions=positions, query_positions=query_positions, starts=starts, lengths=lengths,
        slots=slots, softcap=softcap, keys_scale=keys_scale, temperature=temperature, noise_seed=noise_seed,
    )  # fmt: skip
    if lse is None:
        parts, scores = part_sums(query, keys, splits=splits, store=rows == 1, **options)
        lse = parts[0] if parts.shape[0] == 1 else torch.logsumexp(parts, dim=0)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float()[:, None] / temperature)
        if scores is not None:
            return scores.sub_(lse.masked_fill(lse == -torch.inf, 0)).exp_()
    else:
        lse = lse.float().contiguous()
    group = query.shape[1] // kv_heads
    block_g = power_of_two(group)
    arguments = shared_arguments(query, keys, **options)
    block_m = max(block_g, block_rows(block_g * rows, arguments["ARITHMETIC"] == FULL))
    causal = arguments["CAUSAL"]
    with on_device(query):
        triton_kernels.column_kernel[lambda meta: (-(-slots // meta["BLOCK_N"]), query.shape[0] * kv_heads)](
            lse=lse, output=mass, **arguments, BLOCK_M=block_m, BLOCK_G=block_g, SKIP=causal
        )
    return mass


def noise_base(seed: int) -> int:
    """What the noise takes of a 64-bit seed: its two halves hashed into 32 bits, as
    `kvpress.kernels.attention_mass.noise` does.
    """
    return _mixed(_mixed(seed & LOW) ^ ((seed >> 32) & LOW))


def _mixed(x: int) -> int:
    """The finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & LOW
    return x ^ (x >> 16)


def part_sums(
    query: Tensor, keys: Tensor, *, splits: int | None, store: bool, slots: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exp `[parts, batch, query_heads, rows]` of every row over each part of the slots, without sinks.

    With `store`, for a single row, also its scores `[batch, query_heads, slots]`, `-inf` where a slot is not visible.
    """
    batch, query_heads, rows, _ = query.shape
    arguments = shared_arguments(query, keys, slots=slots, **options)
    kv_heads, group = arguments["KV_HEADS"], arguments["GROUP"]
    block_m = block_rows(group * rows, arguments["ARITHMETIC"] == FULL)
    blocks = -(-group * rows // block_m)
    parts = plan_splits(query, blocks * batch * kv_heads, slots) if splits is None else splits
    lse = query.new_empty(parts, batch, query_heads, rows, dtype=torch.float32)
    scores = None
    if store:  # slots past the length of a ragged head are never visited
        scores = query.new_full((batch, query_heads, slots), -torch.inf, dtype=torch.float32)
    with on_device(query):
        triton_kernels.lse_kernel[(blocks, batch * kv_heads, parts)](
            lse=lse, scores_out=scores, splits=parts, **arguments,
            BLOCK_M=block_m, SKIP=arguments["CAUSAL"] and rows > 1,
        )  # fmt: skip
    return lse, scores


def shared_arguments(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    slots: int,
    softcap: float | None,
    keys_scale: Tensor | None,
    temperature: float,
    noise_seed: int | None,
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    # without positions in the dense layout every row sees every slot, and the rows' positions serve the noise alone
    causal = query_positions is not None and (positions is not None or starts is not None)
    kv_heads = starts.shape[1] if starts is not None else keys.shape[1]
    kind, unit = arithmetic(query, keys), stride_unit(keys)
    block_d = max(16, power_of_two(query.shape[-1]))
    return dict(
        query=query, keys=keys, keys_scale=keys_scale, positions=positions, query_positions=query_positions,
        starts=None if starts is None else starts.contiguous(),
        lengths=None if lengths is None else lengths.contiguous(),
        scaling=scaling, softcap=softcap, noise_base=None if noise_seed is None else noise_base(noise_seed),
        coolness=1.0 / temperature, rows=query.shape[2], entries=slots,
        **strides("q", query, "bhrd"), **slot_strides("k", keys, "bhsd", unit), **slot_strides("x", keys_scale, "bhs"),
        **strides("p", positions, "bhs"), **strides("r", query_positions, "br"),
        KV_HEADS=kv_heads, GROUP=query.shape[1] // kv_heads, DIM=query.shape[-1], UNIT=unit, CAUSAL=causal,
        ARITHMETIC=kind, PRECISION=precision(),
        BLOCK_D=block_d, CHUNK_D=min(block_d, 64) if kind == FULL and block_d > 128 else block_d,
    )  # fmt: skip
