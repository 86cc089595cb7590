"""Attention mass: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from torch import Tensor

from kvpress.kernels.attention_mass import reference
from kvpress.kernels.dispatch import choose
from kvpress.kernels.shapes import check_query_and_slots


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
    row_weights: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum over the query rows of the softmax weight that each slot receives: the column sums of the attention matrix, never built whole.

    Args:
        query: `[batch, query_heads, rows, dim]`: the rows that vote (all of a prompt, its last `window`, or one decoded row).
        keys: the slots, dense `[batch, kv_heads, slots, dim]` or flat (see `kvpress.kernels.shapes`).
        scaling, positions, starts, lengths, softcap, sinks: as in `kvpress.kernels.attention.attend`.
        query_positions: `[batch or 1, rows]` integer; a negative one is padding and votes for nothing.
        row_weights: `[batch or 1, rows]`: factor of each row in the sum; `None` for 1.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, query_heads, slots]` in fp32 (fp64 for fp64 input), 0 for empty slots. Each row with a visible slot adds 1 in all
        (less its sink's share).

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or an explicit `impl` that cannot serve these arguments.
    """
    check_query_and_slots(query, keys, keys, starts, lengths)
    choose("attention mass", impl, {"reference": lambda: None})
    return reference.attention_mass(
        query,
        keys,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        softcap=softcap,
        sinks=sinks,
        row_weights=row_weights,
    )
