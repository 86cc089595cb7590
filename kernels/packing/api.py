"""Packing: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.packing import native, reference
from kvpress.kernels.packing.int4 import MULTIPLE
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
    packed: Tensor = _implementation(rows, impl).pack_int8(rows)
    return packed


def pack_int4(rows: Tensor, centre: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Rows as int4, two codes a byte, each followed by the four bytes of its fp32 scale.

    The centre is taken off a row (in fp32); its channels are mixed by a Walsh-Hadamard matrix, for each block of the greatest power of two
    that divides `dim`, so that none stands out; its scale is the largest magnitude / 7, and every number is rounded to the nearest of its
    multiples, halves to the even one. Channels `2 i` and `2 i + 1` lie in byte `i`, the first in the low half, each plus 8. Behind the
    codes is the scale divided by the size of a block: the product of `codes * scale` with a query whose channels are mixed alike is that of
    the row. A row with a number that is not finite gets a NaN scale, or an infinite one.

    Args:
        rows: `[..., dim]` of floating-point numbers, `dim` a multiple of 8.
        centre: `[..., dim]`, for all rows along the dimension before the last of `rows`.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[..., dim / 2 + 4]` uint8, contiguous.

    Raises:
        ValueError: another `dim`, a centre of another shape, an unknown `impl`, or an explicit one that cannot serve.
    """
    if rows.shape[-1] % MULTIPLE:
        raise ValueError(f"int4 rows need head sizes that are multiples of {MULTIPLE}, got {rows.shape[-1]}")
    if centre is not None and centre.shape != (*rows.shape[:-2], rows.shape[-1]):
        raise ValueError(
            f"centre must have the shape of rows without the last dimension but one, {(*rows.shape[:-2], rows.shape[-1])}, "
            f"got {tuple(centre.shape)}"
        )
    packed: Tensor = _implementation(rows, impl).pack_int4(rows, centre)
    return packed


def _implementation(rows: Tensor, impl: str) -> Any:
    if impl == "auto" and torch.compiler.is_compiling():
        return reference
    chosen = choose(
        "packing",
        impl,
        {
            "native": lambda: native.refusal(rows),
            "triton": lambda: triton_support.refusal(rows) or _not_rows(rows),
            "reference": lambda: None,
        },
    )
    if chosen == "triton":
        return import_module("kvpress.kernels.packing.triton")
    return native if chosen == "native" else reference


def _not_rows(rows: Tensor) -> str | None:
    return None if 2 <= rows.dim() <= 4 else f"rows must have two to four dimensions, got {rows.dim()}"
