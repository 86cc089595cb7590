"""Attention mass: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.attention_mass import native, reference
from kvpress.kernels.dispatch import choose
from kvpress.kernels.shapes import check_query_and_slots, check_scales, check_slot_options


def attention_mass(
    query: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keys_scale: Tensor | None = None,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,
    temperature: float = 1.0,
    noise_seed: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum over the query rows of the softmax weight that each slot receives: column sums of attention, never built
    whole.

    Args:
        query: `[batch, query_heads, rows, dim]`: the rows that vote (all of a prompt, its last `window`, or one decoded
            row).
        keys: the slots, dense `[batch, kv_heads, slots, dim]` or flat (see `kvpress.kernels.shapes`).
        scaling, positions, starts, lengths, softcap, sinks, keys_scale: as in `kvpress.kernels.attention.attend`.
        query_positions: `[batch or 1, rows]` integer; a negative one is padding and votes for nothing.
        row_weights: `[batch or 1, rows]`: factor of each row in the sum; `None` for 1.
        lse: `[batch, query_heads, rows]`: the log-sum-exp that `attend` returned for these rows, which spares computing
            it; only without noise and at temperature 1.
        temperature: scores are divided by it, noise included.
        noise_seed: add Gumbel noise to the scores (Keyformer, arXiv 2403.09054), a function of the seed, the query head
            and the positions of row and key alone: see `kvpress.kernels.attention_mass.noise`. `None`: no noise.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, query_heads, slots]` in fp32 (fp64 for fp64 input), 0 for empty slots. Each row with a visible slot
        adds 1 in all (less its sink's share).

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, `lse` with noise or a temperature, an
            unknown `impl`, or an explicit `impl` that cannot serve these arguments.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.attention_mass(
            query, keys, scaling, positions, query_positions, starts, lengths, softcap, sinks, keys_scale, row_weights,
            lse, temperature, noise_seed,
        )  # fmt: skip
    kv_heads = check_query_and_slots(query, keys, keys, starts, lengths)
    batch, query_heads, rows, _ = query.shape
    slots = keys.shape[2] if starts is None else None
    check_slot_options(batch, kv_heads, rows, slots, positions, query_positions, lengths, None)
    check_scales(keys, keys, keys_scale, keys_scale)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if lse is not None and (noise_seed is not None or temperature != 1.0):
        raise ValueError("lse can be given only without noise and at temperature 1: it belongs to the plain scores")
    if lse is not None and lse.shape != (batch, query_heads, rows):
        raise ValueError(
            f"lse must be [batch, query_heads, rows] = {(batch, query_heads, rows)}, got {tuple(lse.shape)}"
        )
    if sinks is not None and sinks.shape != (query_heads,):
        raise ValueError(f"sinks must be [query_heads] = ({query_heads},), got {tuple(sinks.shape)}")
    if row_weights is not None and (row_weights.shape[0] not in (1, batch) or row_weights.shape[1:] != (rows,)):
        raise ValueError(f"row_weights must be [batch or 1, rows] = {(batch, rows)}, got {tuple(row_weights.shape)}")
    chosen = choose(
        "attention mass",
        impl,
        {
            "native": lambda: native.refusal(query, keys, kv_heads, temperature=temperature, noise_seed=noise_seed),
            "triton": lambda: (
                triton_support.refusal(query, keys)
                or triton_support.storage_refusal(keys)
                or ("the Triton kernel has no row weights" if row_weights is not None else None)
            ),
            "reference": lambda: None,
        },
    )
    arguments: dict[str, Any] = {
        "scaling": scaling,
        "positions": positions,
        "query_positions": query_positions,
        "starts": starts,
        "lengths": lengths,
        "softcap": softcap,
        "sinks": sinks,
        "keys_scale": keys_scale,
        "lse": lse,
        "temperature": temperature,
        "noise_seed": noise_seed,
    }
    if chosen == "native":
        return native.attention_mass(query, keys, kv_heads=kv_heads, row_weights=row_weights, **arguments)
    if chosen == "triton":
        launched: Tensor = import_module("kvpress.kernels.attention_mass.triton").attention_mass(
            query, keys, **arguments
        )
        return launched
    return reference.attention_mass(query, keys, row_weights=row_weights, **arguments)
