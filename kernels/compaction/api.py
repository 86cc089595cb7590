"""Compaction: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.compaction import native, reference
from kvpress.kernels.dispatch import choose


def compact(columns: Sequence[Tensor], index: Tensor, *, impl: str = "auto") -> list[Tensor]:
    """The slots that `index` names, of every column, contiguous: survivors of an eviction.

    Args:
        columns: `[batch, kv_heads, slots, dim]` or `[batch, kv_heads, slots]` each (keys, values, positions, scores …),
            any type and strides.
        index: `[batch, kv_heads or 1, n]` integer; `-1` gives zeros.
        impl: `"auto"` or the name of an implementation.

    Returns:
        For each column `[batch, kv_heads, n, dim]` or `[batch, kv_heads, n]`, of its type.

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or an explicit one that cannot serve.
        IndexError: an index that names no slot.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.compact(list(columns), index)
    for column in columns:
        if column.dim() not in (3, 4):
            raise ValueError(f"columns must be [batch, kv_heads, slots] or with dim, got {tuple(column.shape)}")
        batch, kv_heads = column.shape[:2]
        if index.dim() != 3 or index.shape[0] not in (1, batch) or index.shape[1] not in (1, kv_heads):
            raise ValueError(
                f"index must be [batch, kv_heads or 1, n] = {(batch, kv_heads)} + (n,), got {tuple(index.shape)}"
            )
    chosen = choose(
        "compaction",
        impl,
        {
            "native": lambda: native.refusal(columns, index),
            "triton": lambda: triton_support.refusal(index.new_empty(0).float(), *columns, index),
            "reference": lambda: None,
        },
    )
    if chosen == "triton":
        launch = import_module("kvpress.kernels.compaction.triton").compact
        return [launch(column, index) for column in columns]
    one = native.compact if chosen == "native" else reference.compact
    return [one(column, index) for column in columns]
