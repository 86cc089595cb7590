"""Eviction of one slot a head by the compiled CPU kernels (`kernels/native/columns.cpp`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.kernels.native import missing
from kvpress.kernels.native import tensors as native

FOREVER = torch.iinfo(torch.int64).max


def refusal(scores: Tensor, positions: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if missing is not None:
        return missing
    if not (scores.is_cpu and positions.is_cpu):
        return "native kernels read host memory only"
    return None if scores.dtype == torch.float32 else f"native kernels take fp32 scores, not {scores.dtype}"


def overwrite_refusal(columns: Sequence[Tensor], rows: Sequence[Tensor], slot: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if missing is not None:
        return missing
    for tensor in (*columns, *rows, slot):
        if not tensor.is_cpu:
            return "native kernels read host memory only"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "native kernels have no gradient"
    for column in columns:
        if column.dim() in (2, 4) and column.stride()[-1] != 1:
            return "native kernels need a contiguous last dimension of rows"
    return None


def weakest(
    scores: Tensor,
    positions: Tensor,
    sinks: int | Tensor,
    first_recent: int | Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.eviction.weakest`."""
    batch, slots = scores.shape[0], scores.shape[2]
    kv_heads = max(scores.shape[1], positions.shape[1])
    scores = scores if scores.stride()[-1] == 1 else scores.contiguous()
    positions = native.as_integers(positions)
    slot = torch.empty(batch, kv_heads, dtype=torch.int64)
    owners: list[Tensor] = []

    def per_head(limit: int | Tensor | None, none: int) -> tuple[int, int]:
        if isinstance(limit, Tensor):
            limit = limit.long().expand(batch, kv_heads, 1).contiguous()
            owners.append(limit)
            return limit.data_ptr(), 0
        return 0, none if limit is None else limit

    sink_pointer, all_sinks = per_head(sinks, 0)
    recent_pointer, all_recent = per_head(first_recent, FOREVER)
    length_pointer = 0
    if lengths is not None:
        lengths = native.as_int64(lengths).contiguous()
        length_pointer = lengths.data_ptr()
    native.built().weakest(
        batch,
        kv_heads,
        slots,
        scores.data_ptr(),
        *native.batch_and_head_strides(scores, batch, kv_heads),
        positions.data_ptr(),
        positions.element_size(),
        *native.batch_and_head_strides(positions, batch, kv_heads),
        length_pointer,
        sink_pointer,
        recent_pointer,
        all_sinks,
        all_recent,
        slot.data_ptr(),
    )
    return slot


def overwrite(columns: Sequence[Tensor], rows: Sequence[Tensor], slot: Tensor, starts: Tensor | None) -> None:
    """See `kvpress.kernels.eviction.overwrite`."""
    batch, kv_heads = slot.shape
    slot = native.as_int64(slot).contiguous()
    start_pointer = 0
    if starts is not None:
        starts = native.as_int64(starts).contiguous()
        start_pointer = starts.data_ptr()
    write = native.built().overwrite
    for column, row in zip(columns, rows, strict=True):
        size = column.element_size()
        if starts is None:
            wide = column.dim() == 4
            slots = column.shape[2]
            strides = column.stride()[:3]
        else:
            wide = column.dim() == 2
            slots = column.shape[0]
            strides = (0, 0, column.stride(0))
        if wide and row.stride()[-1] != 1:
            row = row.contiguous()
        row_strides = row.stride()
        write(
            batch,
            kv_heads,
            slots,
            size * (column.shape[-1] if wide else 1),
            column.data_ptr(),
            strides[0] * size,
            strides[1] * size,
            strides[2] * size,
            start_pointer,
            slot.data_ptr(),
            row.data_ptr(),
            row_strides[0] * size if row.shape[0] == batch else 0,
            row_strides[1] * size if row.shape[1] == kv_heads else 0,
        )
