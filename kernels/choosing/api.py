"""Choosing slots: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from torch import Tensor

from kvpress.kernels.choosing import native, reference
from kvpress.kernels.dispatch import choose
from kvpress.kernels.shapes import check_query_and_slots, check_scales, check_slot_options


def best_slots(scores: Tensor, count: int, *, impl: str = "auto") -> Tensor:
    """The `count` entries of highest score of each row, ascending; of equal scores the later one.

    Args:
        scores: `[…, slots]` floating-point without NaN; both zeros are equal.
        count: at least 1; of fewer entries all are returned.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[…, min(count, slots)]` int64.

    Raises:
        ValueError: a `count` below 1, an unknown `impl`, or an explicit one that cannot serve.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    chosen = choose("best slots", impl, {"native": lambda: native.scores_refusal(scores), "reference": lambda: None})
    return (native if chosen == "native" else reference).best_slots(scores, min(count, scores.shape[-1]))


def largest_products(
    query: Tensor,
    keys: Tensor,
    *,
    positions: Tensor | None = None,
    keys_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The largest dot product of each slot over the query heads of its KV head (TidalDecode, arXiv 2410.05076).

    Args:
        query: `[batch, query_heads, 1, dim]`; query head `h` belongs to KV head `h // (query_heads // kv_heads)`.
        keys: the slots, dense; int8 with `keys_scale` `[batch, kv_heads, slots]`.
        positions: `[batch, kv_heads or 1, slots]`, `-1` for an empty slot.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, kv_heads, slots]` in fp32 (fp64 for fp64 input); `-inf` for an empty slot, and where a product is NaN.

    Raises:
        ValueError: shapes that do not fit, more than one row, an unknown `impl`, or an explicit one that cannot serve.
    """
    kv_heads = check_query_and_slots(query, keys, keys, None, None)
    if query.shape[2] != 1:
        raise ValueError(f"query must have a single row to choose, got {query.shape[2]}")
    check_slot_options(query.shape[0], kv_heads, 1, keys.shape[2], positions, None, None, None)
    check_scales(keys, keys, keys_scale, keys_scale)
    chosen = choose(
        "largest products", impl, {"native": lambda: native.refusal(query, keys), "reference": lambda: None}
    )
    return (native if chosen == "native" else reference).largest_products(query, keys, positions, keys_scale)


def reused_slots(
    query: Tensor,
    former: Tensor,
    live: Tensor,
    chosen: Tensor,
    *,
    threshold: float,
    sinks: int,
    local: int,
    slots: int,
    impl: str = "auto",
) -> Tensor | None:
    """TokenSelect's Selection Cache (arXiv 2411.02886): what was chosen for a former query, with sinks and local window, if the new query
    is close to it; slots are in order, all of them tokens.

    Args:
        query: `[batch, query_heads, 1, dim]`.
        former: `[batch, query_heads * dim]` of the same type: the query that chose.
        live: `[batch]` bool: rows that chose anything.
        chosen: `[batch, kv_heads or 1, n]` int64: slots between sinks and window.
        threshold: the least cosine of the two queries, all heads together, under which a selection is used again.
        sinks, local: the first and the last slots, always attended to.
        slots: how many there are.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, kv_heads or 1, sinks + n + local]` int64, ascending where `chosen` is; `None` unless every row may use its selection again.

    Raises:
        ValueError: shapes or types that do not fit, an unknown `impl`, or an explicit one that cannot serve.
    """
    batch, heads, rows, dim = query.shape
    if rows != 1 or former.shape != (batch, heads * dim) or former.dtype != query.dtype:
        raise ValueError(
            f"query must be [batch, query_heads, 1, dim] and former [batch, query_heads * dim] of its type, "
            f"got {tuple(query.shape)} of {query.dtype} and {tuple(former.shape)} of {former.dtype}"
        )
    if live.shape != (batch,) or chosen.dim() != 3 or chosen.shape[0] != batch:
        raise ValueError(
            f"live and chosen must be [{batch}] and [{batch}, kv_heads or 1, n], got {tuple(live.shape)} and {tuple(chosen.shape)}"
        )
    _check_ends(sinks, local, slots)
    given = (query, former, live, chosen)
    name = choose(
        "a selection used again", impl, {"native": lambda: native.reuse_refusal(*given), "reference": lambda: None}
    )
    return (native if name == "native" else reference).reused_slots(*given, threshold, sinks, local, slots)


def listed_slots(chosen: Tensor, *, sinks: int, local: int, slots: int, impl: str = "auto") -> Tensor:
    """The first `sinks` slots, `chosen [batch, kv_heads or 1, n]` int64, and the last `local` of `slots`, in this order.

    Raises:
        ValueError: ends that do not fit, an unknown `impl`, or an explicit one that cannot serve.
    """
    _check_ends(sinks, local, slots)
    name = choose("a list of slots", impl, {"native": lambda: native.list_refusal(chosen), "reference": lambda: None})
    return (native if name == "native" else reference).listed_slots(chosen, sinks, local, slots)


def _check_ends(sinks: int, local: int, slots: int) -> None:
    if sinks < 0 or local < 0 or sinks + local > slots:
        raise ValueError(f"sinks and local must fit into {slots} slots, got {sinks} and {local}")
