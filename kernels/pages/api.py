"""Pages: validation and dispatch. `reference.py` is the specification."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from kvpress.kernels import operators, triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.pages import native, reference
from kvpress.kernels.pages.rounding import bounds_type

TRITON_PAGE = 128  # slots of a page that a GPU program holds in registers


def page_bounds(
    keys: Tensor, *, page_size: int, positions: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Lowest and highest key of each page, channel by channel (Quest, arXiv 2406.10774).

    Args:
        keys: `[batch, kv_heads, slots, dim]`; the last page may be short.
        page_size: slots a page.
        positions: `[batch, kv_heads or 1, slots]`; slots at `-1` take no part. A page without a token is `+inf` and
            `-inf`.
        impl: `"auto"` or the name of an implementation.

    Returns:
        Two tensors `[batch, kv_heads, pages, dim]` in the type of `keys`; of fp32 keys in bfloat16, rounded outwards: down and up.

    Raises:
        ValueError: `page_size` below 1, shapes that do not fit, an unknown `impl`, or an explicit one that cannot
            serve.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.page_bounds(keys, page_size, positions)
    if keys.dim() != 4:
        raise ValueError(f"keys must be [batch, kv_heads, slots, dim], got shape {tuple(keys.shape)}")
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    batch, kv_heads, slots, _ = keys.shape
    if positions is not None:
        shape = positions.shape
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, kv_heads) or shape[2] != slots:
            raise ValueError(
                f"positions must be [batch, kv_heads or 1, slots] = {(batch, kv_heads, slots)}, got {tuple(shape)}"
            )
    chosen = choose(
        "page bounds",
        impl,
        {
            "native": lambda: native.refusal(keys, keys),
            "triton": lambda: (
                triton_support.refusal(keys, positions)
                or (f"pages of more than {TRITON_PAGE} slots" if page_size > TRITON_PAGE else None)
            ),
            "reference": lambda: None,
        },
    )
    if chosen == "triton":
        launched: tuple[Tensor, Tensor] = import_module("kvpress.kernels.pages.triton").page_bounds(
            keys, page_size=page_size, positions=positions
        )
        return launched
    if chosen == "native":
        return native.page_bounds(keys, page_size, positions)
    return reference.page_bounds(keys, page_size, positions)


def page_scores(query: Tensor, lowest: Tensor, highest: Tensor, *, impl: str = "auto") -> Tensor:
    """Upper bounds of a query head's dot products over each page: the sum over channels of `q_c high_c`, or of `q_c low_c` where the
    query is negative.

    Args:
        query: `[batch, query_heads, 1, dim]`.
        lowest, highest: `[batch, kv_heads, pages, dim]`, of `page_bounds`.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, query_heads, pages]` in fp32 (fp64 for fp64 input); `-inf` for a page without a token.

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, or an explicit one that cannot serve.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return operators.page_scores(query, lowest, highest)
    _check_bounds(query, lowest, highest)
    chosen = choose(
        "page scores",
        impl,
        {
            "native": lambda: native.refusal(query, lowest, highest),
            "triton": lambda: triton_support.refusal(query, lowest, highest),
            "reference": lambda: None,
        },
    )
    if chosen == "triton":
        launched: Tensor = import_module("kvpress.kernels.pages.triton").page_scores(query, lowest, highest)
        return launched
    if chosen == "native":
        return native.page_scores(query, lowest, highest)
    return reference.page_scores(query, lowest, highest)


def page_slots(
    scores: Tensor,
    count: int,
    *,
    kv_heads: int,
    page_size: int,
    slots: int,
    first: Tensor | None = None,
    newest: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The slots of the `count` pages of highest score of each KV head, that of the newest token always among them.

    Args:
        scores: `[batch, query_heads, pages]`, of `page_scores`; the largest of a KV head's query heads counts. A page where one of them is
            NaN, or all are `-inf`, is taken last, and has no slots. Of equal pages the later is taken.
        count: pages; of fewer all are taken.
        page_size: slots a page.
        slots: how many there are.
        first: `[batch, 1, 1]` int64 slot at which page 0 of each row begins. `None`: 0.
        newest: `[batch, kv_heads or 1, 1]` int64 slot of the newest token, counted from `first`. `None`: the last slot.
        impl: `"auto"` or the name of an implementation.

    Returns:
        `[batch, kv_heads, min(count, pages) * page_size]` int64, ascending but for `-1` where there is no slot.

    Raises:
        ValueError: shapes that do not fit, a `count` or `page_size` below 1, an unknown `impl`, or an explicit one that cannot serve.
    """
    if scores.dim() != 3 or scores.shape[1] % kv_heads:
        raise ValueError(f"scores must be [batch, a multiple of {kv_heads} heads, pages], got {tuple(scores.shape)}")
    batch, _, pages = scores.shape
    _check_choice(count, page_size, batch, kv_heads, first, newest)
    chosen = choose(
        "slots of pages", impl, {"native": lambda: native.scores_refusal(scores), "reference": lambda: None}
    )
    return (native if chosen == "native" else reference).page_slots(
        scores, min(count, pages), kv_heads, page_size, slots, first, newest
    )


def choose_pages(
    query: Tensor,
    lowest: Tensor,
    highest: Tensor,
    count: int,
    *,
    page_size: int,
    slots: int,
    key: Tensor | None = None,
    first: Tensor | None = None,
    newest: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`page_slots` by the `page_scores` of bounds that a new token may widen first.

    Args:
        query: `[batch, query_heads, 1, dim]`.
        lowest, highest: `[batch, kv_heads, pages, dim]`, of `page_bounds`; with `key` they are changed in place.
        count, page_size, slots, first, newest: as of `page_slots`.
        key: `[batch, kv_heads, 1, dim]` of a type with such bounds, of the newest token, in slot `slots - 1`: it is taken into the bounds
            of the last page. What these were counts for nothing where it is the first token of that page. Excludes `first` and `newest`.
        impl: `"auto"`, `"native"`, or `"apart"`: one operation after another.

    Raises:
        ValueError: as `page_scores` and `page_slots`; a `key` that does not fit the bounds, or the last page.
    """
    batch, kv_heads, pages, dim = lowest.shape
    if key is not None:
        if key.shape != (batch, kv_heads, 1, dim) or bounds_type(key.dtype) != lowest.dtype:
            raise ValueError(
                f"key must be [{batch}, {kv_heads}, 1, {dim}] of a type with bounds in {lowest.dtype}, "
                f"got {tuple(key.shape)} of {key.dtype}"
            )
        if first is not None or newest is not None or (slots - 1) // page_size != pages - 1:
            raise ValueError(
                f"key must belong to the last of {pages} pages, got slot {slots - 1} with pages of {page_size}"
            )
    chosen = choose(
        "choice of pages",
        impl,
        {"native": lambda: native.choice_refusal(query, lowest, highest, key), "apart": lambda: None},
    )
    if chosen == "native":
        _check_bounds(query, lowest, highest)
        _check_choice(count, page_size, batch, kv_heads, first, newest)
        return native.choose_pages(query, lowest, highest, min(count, pages), page_size, slots, key, first, newest)
    if key is not None:
        reference.widen_last_page(lowest, highest, key, begins=(slots - 1) % page_size == 0)
    scores = page_scores(query, lowest, highest)
    return page_slots(scores, count, kv_heads=kv_heads, page_size=page_size, slots=slots, first=first, newest=newest)


def _check_bounds(query: Tensor, lowest: Tensor, highest: Tensor) -> None:
    if query.dim() != 4 or query.shape[2] != 1:
        raise ValueError(f"query must be [batch, query_heads, 1, dim], got shape {tuple(query.shape)}")
    if lowest.dim() != 4 or lowest.shape != highest.shape:
        raise ValueError(
            "lowest and highest must be [batch, kv_heads, pages, dim] alike, "
            f"got {tuple(lowest.shape)} and {tuple(highest.shape)}"
        )
    batch, kv_heads, _, dim = lowest.shape
    if query.shape[0] != batch or query.shape[1] % kv_heads or query.shape[3] != dim:
        raise ValueError(f"query must fit the bounds {tuple(lowest.shape)}, got {tuple(query.shape)}")


def _check_choice(
    count: int, page_size: int, batch: int, kv_heads: int, first: Tensor | None, newest: Tensor | None
) -> None:
    if count < 1 or page_size < 1:
        raise ValueError(f"count and page_size must be at least 1, got {count} and {page_size}")
    if first is not None and first.shape != (batch, 1, 1):
        raise ValueError(f"first must be [{batch}, 1, 1], got {tuple(first.shape)}")
    if newest is not None and newest.shape not in ((batch, kv_heads, 1), (batch, 1, 1)):
        raise ValueError(f"newest must be [{batch}, {kv_heads} or 1, 1], got {tuple(newest.shape)}")
