"""Attention mass by the compiled CPU kernels (`kernels/native/mass.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as native
from kvpress.kernels.shapes import most_slots

MOST_GROUP = 96  # query heads a KV head
LEAST_TEMPERATURE = 0.25  # below it the noise of one slot could overflow fp32


def refusal(
    query: Tensor, keys: Tensor, kv_heads: int, *, temperature: float = 1.0, noise_seed: int | None = None
) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    if query.shape[1] // kv_heads > MOST_GROUP:
        return f"native attention mass takes groups up to {MOST_GROUP}, not {query.shape[1] // kv_heads}"
    if noise_seed is not None and temperature < LEAST_TEMPERATURE:
        return f"native attention mass takes noise at temperatures from {LEAST_TEMPERATURE}, not {temperature}"
    return native.refusal(query, keys, keys)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    *,
    kv_heads: int,
    scaling: float,
    positions: Tensor | None,
    query_positions: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    keys_scale: Tensor | None,
    row_weights: Tensor | None,
    lse: Tensor | None,
    temperature: float,
    noise_seed: int | None,
) -> Tensor:
    """See `kvpress.kernels.attention_mass.attention_mass`."""
    entries = most_slots(keys, lengths)
    mass = torch.empty(query.shape[0], query.shape[1], entries, dtype=torch.float32)
    if lse is not None:
        lse = native.as_floats(lse)
    fields, owners = native.attention_fields(
        query,
        keys,
        keys,
        kv_heads=kv_heads,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        softcap=softcap,
        sinks=sinks,
        keys_scale=keys_scale,
        lse=0 if lse is None else lse.data_ptr(),
        weights=mass.data_ptr(),
        entries=entries,
    )
    factors = (0, 0)
    if row_weights is not None:
        row_weights = native.as_floats(row_weights)
        factors = (row_weights.data_ptr(), row_weights.stride(0) if row_weights.shape[0] == query.shape[0] else 0)
    seed = 0 if noise_seed is None else (noise_seed & 0xFFFFFFFFFFFFFFFF)
    signed = seed - (1 << 64) if seed >> 63 else seed
    native.built().attention_mass(*fields, temperature, int(noise_seed is not None), signed, *factors)
    del owners
    return mass
