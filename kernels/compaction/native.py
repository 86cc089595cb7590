"""Compaction by the compiled CPU kernels (`kernels/native/columns.cpp`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.kernels.native import missing
from kvpress.kernels.native import tensors as native


def refusal(columns: Sequence[Tensor], index: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if missing is not None:
        return missing
    for tensor in (*columns, index):
        if not tensor.is_cpu:
            return "native kernels read host memory only"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "native kernels have no gradient"
    for column in columns:
        if column.dim() == 4 and column.stride()[-1] != 1:
            return "native kernels need a contiguous last dimension of rows"
    return None


def compact(slots: Tensor, index: Tensor) -> Tensor:
    """One column; see `kvpress.kernels.compaction.compact`."""
    batch, kv_heads, length = slots.shape[:3]
    index = native.as_int64(index)
    output = torch.empty(batch, kv_heads, index.shape[-1], *slots.shape[3:], dtype=slots.dtype)
    size = slots.element_size()
    strides = slots.stride()
    native.built().gather(
        torch.get_num_threads(),
        batch,
        kv_heads,
        length,
        index.shape[-1],
        size * (slots.shape[3] if slots.dim() == 4 else 1),
        slots.data_ptr(),
        strides[0] * size,
        strides[1] * size,
        strides[2] * size,
        index.data_ptr(),
        *native.batch_and_head_strides(index, batch, kv_heads),
        output.data_ptr(),
    )
    return output
