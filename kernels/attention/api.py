"""Attention over the slots of a layer: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from torch import Tensor

from kvpress.kernels.attention import fused, reference
from kvpress.kernels.dispatch import choose
from kvpress.kernels.scores import causal_positions
from kvpress.kernels.shapes import check_query_and_slots


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    index: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of `query` over slots.

    Args:
        query: `[batch, query_heads, rows, dim]`; query head `h` belongs to KV head `h // (query_heads // kv_heads)`.
        keys, values: the slots, dense or flat (see `kvpress.kernels.shapes`); `values` may have another last size.
        scaling: factor of the dot products.
        positions: `[batch, kv_heads or 1, slots]` integer; `-1` marks an empty slot. `None`: every slot holds a token.
        query_positions: `[batch or 1, rows]` integer; a slot is visible when `0 <= position <= query_position`. `None`: every token is.
        starts, lengths: `[batch, kv_heads]` integer, of the flat layout.
        index: `[batch, kv_heads or 1, n]` integer: attend to these slots only; `-1` is no slot, a slot listed twice counts twice.
        causal: the query rows are the last slots, in order: row `i` sees the first `slots - rows + i + 1` slots. Excludes `positions`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[query_heads]` logits that take part in the softmax and carry no value (gpt-oss).
        impl: `"auto"` or the name of an implementation.

    Returns:
        Output `[batch, query_heads, rows, value_dim]` in the type of `query`, and the log-sum-exp `[batch, query_heads, rows]` in fp32
        (fp64 for fp64 input) of the capped scores, sinks included, or `None` where the implementation has none. A row that sees no
        slot gives 0 (and a log-sum-exp of `-inf`, or of its sink).

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or an explicit `impl` that cannot serve these arguments.
    """
    check_query_and_slots(query, keys, values, starts, lengths)
    if causal and (positions is not None or starts is not None or index is not None):
        raise ValueError("causal describes dense slots in order: it excludes positions, starts and index")
    chosen = choose(
        "attention",
        impl,
        {
            "fused": lambda: fused.refusal(query, softcap=softcap, sinks=sinks, starts=starts, index=index),
            "reference": lambda: None,
        },
    )
    if chosen == "fused":
        output = fused.attend(
            query, keys, values, scaling=scaling, positions=positions, query_positions=query_positions, causal=causal
        )
        return output, None
    if causal:
        positions, query_positions = causal_positions(query, keys)
    return reference.attend(
        query,
        keys,
        values,
        scaling=scaling,
        positions=positions,
        query_positions=query_positions,
        starts=starts,
        lengths=lengths,
        index=index,
        softcap=softcap,
        sinks=sinks,
    )
