"""Rotation: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.rotation import native, reference


def rotate(
    slots: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    positions: Tensor | None = None,
    inverse: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`slots * cosine + rotate_half(slots) * sine` over the first `rotary_dim` channels (arXiv 2104.09864); others
    stay.

    Args:
        slots: `[batch, heads, slots, dim]`, of any floating type; arithmetic is fp32 (fp64 for fp64).
        cosine, sine: `[batch or 1, heads or 1, slots, rotary_dim]`, the two halves alike, scaled as the model scales
            them; with `positions` one table for all, `[table_rows, rotary_dim]`.
        positions: `[batch, heads or 1, slots]` integer: the table row of each slot; `-1` leaves an empty slot as it is.
        inverse: rotate the other way, which undoes a rotation by unscaled tables.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, heads, slots, dim]` in the type of `slots`.

    Raises:
        ValueError: shapes that do not fit, an odd `rotary_dim` or one above `dim`, an unknown `impl`, or an explicit
            one that cannot serve.
        IndexError: a position past the tables.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.rotate(slots, cosine, sine, positions, inverse)
    if slots.dim() != 4:
        raise ValueError(f"slots must be [batch, heads, slots, dim], got shape {tuple(slots.shape)}")
    batch, heads, length, dim = slots.shape
    rotary = cosine.shape[-1]
    if rotary % 2 or rotary > dim:
        raise ValueError(f"rotary_dim must be even and at most dim ({dim}), got {rotary}")
    if positions is None:
        fits = cosine.dim() == 4 and cosine.shape[0] in (1, batch) and cosine.shape[1] in (1, heads)
        fits = fits and cosine.shape[2] == length
    else:
        shape = positions.shape
        fits = cosine.dim() == 2 and len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads)
        fits = fits and shape[2] == length
    if not fits or cosine.shape != sine.shape:
        raise ValueError(
            f"cosine and sine must fit slots {tuple(slots.shape)} (or be [table_rows, rotary_dim], with positions "
            f"[batch, heads or 1, slots]), got {tuple(cosine.shape)}, {tuple(sine.shape)}"
            + ("" if positions is None else f" and positions {tuple(positions.shape)}")
        )
    chosen = choose(
        "rotation",
        impl,
        {
            "native": lambda: native.refusal(slots, cosine, sine),
            "triton": lambda: (
                "tables by position" if positions is not None else triton_support.refusal(slots, cosine, sine)
            ),
            "reference": lambda: None,
        },
    )
    if chosen == "triton":
        launched: Tensor = import_module("kvpress.kernels.rotation.triton").rotate(slots, cosine, sine, inverse=inverse)
        return launched
    if chosen == "native":
        return native.rotate(slots, cosine, sine, positions, inverse)
    return reference.rotate(slots, cosine, sine, positions, inverse)
