"""Attention over slots on GPUs: the launch of the Triton kernels, with the context split over programs where rows are
few.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.attention import triton_kernels
from kvpress.kernels.triton_blocks import FULL, arithmetic, precision
from kvpress.kernels.triton_support import on_device, plan_splits, power_of_two, slot_strides, stride_unit, strides

WEIGHTS_BLOCK = 256  # entries whose weights a program reduces


def block_rows(packed: int, block_d: int, block_v: int, full: bool) -> int:
    """Packed query rows a program holds: at least the tensor cores' 16, at most what leaves the accumulator in
    registers.
    """
    most = 16 if full else 64 if block_d + block_v <= 256 else 32
    return min(most, max(16, power_of_two(packed)))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
    weights: str | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    rotate_by: str = "position",
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `kvpress.kernels.attention.attend`; the third value is that of `attend_with_weights` where `weights` asks
    for it.

    Args:
        weights: `"mean"`, `"sum"` or `"max"` over the query heads of a KV head, for a single row.
        rotation: cosine and sine tables, each `[places, rotary_dim]` with its two halves alike: keys are stored
            unrotated and turned
            as they are read, channel `d` with `d + rotary_dim / 2`. Queries come rotated.
        rotate_by: the place of a key is its `"position"`, or its `"entry"` in the list that is read.
        splits: parts of the context that programs of their own read; `None`: as many as keep the GPU busy.

    Raises:
        ValueError: `splits` below 1, an unknown `rotate_by`, or tables that do not fit.
    """
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    batch, query_heads, rows, dim = query.shape
    cosine, sine = _tables(rotation, rotate_by, positions, dim)
    constant = constant_arguments(
        query, keys, values, scaling=scaling, positions=positions, query_positions=query_positions, starts=starts,
        lengths=lengths, index=index, softcap=softcap, keys_scale=keys_scale, values_scale=values_scale,
        rotary=0 if cosine is None else cosine.shape[-1], by_entry=rotate_by == "entry",
    )  # fmt: skip
    kv_heads, value_dim = constant["KV_HEADS"], values.shape[-1]
    if index is not None:
        entries = index.shape[-1]
    elif (
        lengths is not None
    ):  # what a head reads ends at its length; only weights need the longest (and a synchronisation)
        entries = keys.shape[0] if weights is None else int(lengths.max()) if lengths.numel() else 0
    else:
        entries = keys.shape[2]
    longest = entries if index is not None or starts is None else keys.shape[0] // max(1, batch * kv_heads)
    blocks = -(-constant["GROUP"] * rows // constant["BLOCK_M"])
    parts = plan_splits(query, blocks * batch * kv_heads, longest) if splits is None else splits
    output = query.new_empty(batch, query_heads, rows, value_dim)
    lse = query.new_empty(batch, query_heads, rows, dtype=torch.float32)
    scores = reduced = None
    if weights is not None:
        scores = query.new_empty(batch, query_heads, entries, dtype=torch.float32)
        reduced = query.new_empty(batch, kv_heads, entries, dtype=torch.float32)
    if lse.numel() == 0:
        return output, lse, reduced
    part_output, part_lse = output, lse
    if parts > 1:
        part_output = output.new_empty(parts, *output.shape, dtype=torch.float32)
        part_lse = lse.new_empty(parts, *lse.shape)
    with on_device(query):
        triton_kernels.attend_kernel[(blocks, batch * kv_heads, parts)](
            **constant, query=query, index=index, cosine=cosine, sine=sine, sinks=None if parts > 1 else sinks,
            output=part_output, lse=part_lse, scores_out=scores, entries=entries, splits=parts, SPLIT=parts > 1,
        )  # fmt: skip
        if parts > 1:
            triton_kernels.merge_kernel[(prod(lse.shape), 1, 1)](
                partial_output=part_output, partial_lse=part_lse, output=output, lse=lse, splits=parts,
                **merge_arguments(constant, lse.numel(), sinks, parts),
            )  # fmt: skip
        if reduced is not None and reduced.numel():
            ends = None if lengths is None or index is not None else lengths.contiguous()
            triton_kernels.weights_kernel[(-(-entries // WEIGHTS_BLOCK), batch * kv_heads, 1)](
                scores=scores, lse=lse, output=reduced, entries=entries, **weights_arguments(constant, ends, weights)
            )
    return output, lse, reduced


def constant_arguments(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    index: Tensor | None,
    softcap: float | None,
    keys_scale: Tensor | None,
    values_scale: Tensor | None,
    rotary: int,
    by_entry: bool,
) -> dict[str, Any]:
    """Arguments of the kernel that are the same for every query, index and number of slots of one kind."""
    query_heads, rows, dim = query.shape[1:]
    kv_heads = starts.shape[1] if starts is not None else keys.shape[1]
    if positions is None and starts is None and index is None:
        query_positions = None  # nothing is masked: every slot holds a token that every row sees
    kind, unit = arithmetic(query, keys, values), stride_unit(keys, values)
    group, value_dim = query_heads // kv_heads, values.shape[-1]
    block_d, block_v = max(16, power_of_two(dim)), max(16, power_of_two(value_dim))
    chunk_d = min(block_d, 64) if kind == FULL and block_d + block_v > 256 else block_d
    places = {"stride_ps": 0 if positions is None else positions.stride(-1)}  # also where there is but one slot yet
    entries = {"stride_is": 0 if index is None else index.stride(-1)}
    return dict(
        keys=keys, values=values, keys_scale=keys_scale, values_scale=values_scale,
        positions=positions, query_positions=query_positions,
        starts=None if starts is None else starts.contiguous(),
        lengths=None if lengths is None else lengths.contiguous(),
        scaling=scaling, softcap=softcap, rows=rows,
        **strides("q", query, "bhrd"),
        **slot_strides("k", keys, "bhsd", unit), **slot_strides("v", values, "bhsd", unit), UNIT=unit,
        **slot_strides("x", keys_scale, "bhs"), **slot_strides("y", values_scale, "bhs"),
        **(strides("p", positions, "bhs") | places), **(strides("i", index, "bhs") | entries),
        **strides("r", query_positions, "br"),
        ROTARY=rotary, BY_ENTRY=by_entry,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, VALUE_DIM=value_dim,
        CAUSAL=query_positions is not None, SKIP=query_positions is not None and rows > 1,
        ARITHMETIC=kind, PRECISION=precision(),
        BLOCK_M=block_rows(group * rows, block_d, block_v, kind == FULL),
        BLOCK_D=block_d, CHUNK_D=chunk_d, BLOCK_V=block_v,
    )  # fmt: skip


def merge_arguments(constant: dict[str, Any], total: int, sinks: Tensor | None, parts: int) -> dict[str, Any]:
    """Arguments of the merge of `parts` parts of `total` rows, but for the tensors."""
    return dict(
        sinks=sinks, total_rows=total, rows=constant["rows"], QUERY_HEADS=constant["KV_HEADS"] * constant["GROUP"],
        VALUE_DIM=constant["VALUE_DIM"], BLOCK_S=power_of_two(parts), BLOCK_V=constant["BLOCK_V"],
    )  # fmt: skip


def weights_arguments(constant: dict[str, Any], ends: Tensor | None, reduction: str | None) -> dict[str, Any]:
    """Arguments of the reduction of weights, but for the tensors and their length."""
    group = constant["GROUP"]
    return dict(lengths=ends, GROUP=group, REDUCTION=reduction, BLOCK_G=power_of_two(group), BLOCK_N=WEIGHTS_BLOCK)


def _tables(
    rotation: tuple[Tensor, Tensor] | None, rotate_by: str, positions: Tensor | None, dim: int
) -> tuple[Tensor | None, Tensor | None]:
    if rotation is None:
        return None, None
    if rotate_by not in ("position", "entry"):
        raise ValueError(f"rotate_by must be 'position' or 'entry', got {rotate_by!r}")
    if rotate_by == "position" and positions is None:
        raise ValueError("positions must be given to rotate keys by their position")
    cosine, sine = rotation
    if cosine.dim() != 2 or cosine.shape != sine.shape or cosine.shape[-1] % 2 or cosine.shape[-1] > dim:
        raise ValueError(
            f"rotation must be two tables [places, rotary_dim] with an even rotary_dim up to {dim}, "
            f"got {tuple(cosine.shape)} and {tuple(sine.shape)}"
        )
    return cosine.contiguous(), sine.contiguous()
