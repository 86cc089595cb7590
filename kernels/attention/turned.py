"""Attention to keys that are stored before their rotation, and turned to their places in the list that is read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.attention import native
from kvpress.kernels.attention.api import attend
from kvpress.kernels.dispatch import choose
from kvpress.kernels.rotation import rotate
from kvpress.kernels.scores import scale_slots, select_slots


def attend_turned(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rotation: tuple[Tensor, Tensor],
    scaling: float,
    positions: Tensor | None = None,
    index: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`attend` of a single row to dense slots, where the key of entry `i` of the list is first rotated to position `i`, and the row to the
    last of these positions.

    Args:
        query: `[batch, query_heads, 1, dim]`, not rotated.
        rotation: cosines and sines, `[places, rotary_dim]` each with its two halves alike, a row for each entry at least: channel `d` is
            turned with channel `d + rotary_dim / 2` (`kvpress.kernels.rotation`).
        keys, values, scaling, positions, index, softcap, sinks, keys_scale, values_scale: as of `attend`. Without `index` the entries are
            the slots.
        impl: `"auto"`, `"native"` or `"triton"`, which turn keys as they read them, or `"apart"`: a turned copy of the keys is made.

    Returns:
        As `attend`.

    Raises:
        ValueError: as `attend`; more than one row, or tables that do not fit.
    """
    cosine, sine = rotation
    entries = keys.shape[2] if index is None else index.shape[-1]
    places, rotary = cosine.shape if cosine.dim() == 2 else (0, 1)
    if cosine.shape != sine.shape or places < entries or rotary % 2 or rotary > query.shape[-1]:
        raise ValueError(
            f"rotation must be two tables [at least {entries}, rotary_dim] with an even rotary_dim up to {query.shape[-1]}, "
            f"got {tuple(cosine.shape)} and {tuple(sine.shape)}"
        )
    if query.shape[2] != 1:
        raise ValueError(f"query must have a single row where keys are turned as they are read, got {query.shape[2]}")
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    scales: dict[str, Any] = {"keys_scale": keys_scale, "values_scale": values_scale}
    kv_heads = keys.shape[1]
    chosen = "apart"
    if not torch.compiler.is_compiling():
        chosen = choose(
            "attention to turned keys",
            impl,
            {
                "native": lambda: native.refusal(query, keys, values, kv_heads, turned=True),
                "triton": lambda: (
                    triton_support.refusal(query, keys, values) or triton_support.storage_refusal(keys, values)
                ),
                "apart": lambda: None,
            },
        )
    if chosen != "native" and entries:
        last = [table[None, None, entries - 1 : entries] for table in rotation]
        query = rotate(query, *last, impl="triton" if chosen == "triton" else "auto")
    if chosen == "apart":
        keys, values = scale_slots(keys, keys_scale).to(query.dtype), scale_slots(values, values_scale).to(query.dtype)
        if index is not None:
            keys, values, positions = select_slots(keys, values, positions, index)
        return attend(
            query,
            rotate(keys, cosine[None, None, :entries], sine[None, None, :entries]),
            values,
            positions=positions,
            **options,
        )
    whole: dict[str, Any] = {
        "positions": positions,
        "query_positions": None,
        "starts": None,
        "lengths": None,
        "index": index,
    }
    if chosen == "native":
        served = native.attend(query, keys, values, kv_heads=kv_heads, rotation=rotation, **whole, **scales, **options)
    else:
        served = import_module("kvpress.kernels.attention.triton").attend(
            query, keys, values, rotation=rotation, rotate_by="entry", **whole, **scales, **options
        )
    output, lse, _ = served
    return output, lse
