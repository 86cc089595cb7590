"""Packing: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.packing import native, reference
from kvpress.kernels.packing.reference import SCALE_BYTES


def pack_int8(rows: Tensor, *, impl: str = "auto") -> Tensor:
    """Rows as int8, each followed by the four bytes of its fp32 scale.

    The scale is the row's largest magnitude / 127; every number is rounded to the nearest of its multiples, halves to the even one. A
    row with a NaN gets a NaN scale.

    Args:
        rows: `[..., dim]` of floating-point numbers, `dim` a multiple of 4, so that scales can be read in place.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[..., dim + 4]` int8, contiguous.

    Raises:
        ValueError: another `dim`, an unknown `impl`, or an explicit one that cannot serve.
    """
    if rows.shape[-1] % SCALE_BYTES:
        raise ValueError(f"int8 rows need head sizes that are multiples of {SCALE_BYTES}, got {rows.shape[-1]}")
    if torch.compiler.is_compiling():
        return reference.pack_int8(rows)
    chosen = choose(
        "packing",
        impl,
        {
            "native": lambda: native.refusal(rows),
            "triton": lambda: triton_support.refusal(rows) or _not_rows(rows),
            "reference": lambda: None,
        },
    )
    if chosen == "native":
        return native.pack_int8(rows)
    if chosen == "triton":
        packed: Tensor = import_module("kvpress.kernels.packing.triton").pack_int8(rows)
        return packed
    return reference.pack_int8(rows)


def _not_rows(rows: Tensor) -> str | None:
    return None if 2 <= rows.dim() <= 4 else f"rows must have two to four dimensions, got {rows.dim()}"
