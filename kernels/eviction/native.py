"""Eviction of one slot a head by the compiled CPU kernels (`kernels/native/columns.cpp`)."""

from __future__ import annotations

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
