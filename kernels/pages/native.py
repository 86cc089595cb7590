"""Pages by the compiled CPU kernels (`kernels/native/pages.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.choosing.native import scores_refusal
from kvpress.kernels.native import tensors as native
from kvpress.kernels.pages.rounding import bounds_type

__all__ = ["page_bounds", "page_scores", "page_slots", "refusal", "scores_refusal"]


def refusal(query: Tensor, *bounds: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    first, last = bounds[0], bounds[-1]
    return native.refusal(query, first, last) or (
        "native pages take fp32, bf16 and fp16, not int8" if first.dtype not in native.FLOATS else None
    )


def choice_refusal(query: Tensor, lowest: Tensor, highest: Tensor, key: Tensor | None) -> str | None:
    """Why `choose_pages` cannot be served in one call, or `None`."""
    if torch.compiler.is_compiling() or (key is not None and key.stride()[-1] != 1):
        return "native kernels need a contiguous last dimension, and cannot be traced"
    return refusal(query, lowest, highest)


def page_bounds(keys: Tensor, page_size: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.pages.page_bounds`."""
    batch, kv_heads, slots, dim = keys.shape
    lowest = torch.empty(batch, kv_heads, -(-slots // page_size), dim, dtype=bounds_type(keys.dtype))
    highest = torch.empty_like(lowest)
    placed = (0, 0, 0, 0)
    if positions is not None:
        positions = native.as_integers(positions)
        placed = (
            positions.data_ptr(),
            positions.element_size(),
            *native.batch_and_head_strides(positions, batch, kv_heads),
        )
    native.built().page_bounds(
        torch.get_num_threads(),
        batch,
        kv_heads,
        slots,
        dim,
        page_size,
        keys.data_ptr(),
        native.FLOATS[keys.dtype],
        *keys.stride()[:3],
        *placed,
        lowest.data_ptr(),
        highest.data_ptr(),
        native.FLOATS[lowest.dtype],
    )
    return lowest, highest


def page_scores(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """See `kvpress.kernels.pages.page_scores`."""
    batch, query_heads, pages = query.shape[0], query.shape[1], lowest.shape[2]
    scores = torch.empty(batch, query_heads, pages, dtype=torch.float32)
    native.built().page_scores(*_score_fields(query, lowest, highest), scores.data_ptr())
    return scores


def _score_fields(query: Tensor, lowest: Tensor, highest: Tensor) -> tuple[int, ...]:
    """The fields of `PageScores` but for the scores."""
    batch, query_heads, _, dim = query.shape
    kv_heads, pages = lowest.shape[1:3]
    return (
        torch.get_num_threads(),
        batch,
        query_heads,
        kv_heads,
        pages,
        dim,
        query.data_ptr(),
        native.FLOATS[query.dtype],
        *query.stride()[:2],
        lowest.data_ptr(),
        highest.data_ptr(),
        native.FLOATS[lowest.dtype],
        *lowest.stride()[:3],
        *highest.stride()[:3],
    )


def page_slots(
    scores: Tensor,
    count: int,
    kv_heads: int,
    page_size: int,
    slots: int,
    first: Tensor | None,
    newest: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.pages.page_slots`."""
    scores = scores if scores.is_contiguous() else scores.contiguous()
    batch, query_heads, pages = scores.shape
    index, places, owners = _places(batch, kv_heads, count, page_size, first, newest)
    native.built().page_slots(
        batch, query_heads, kv_heads, pages, count, page_size, slots, scores.data_ptr(), *places, index.data_ptr()
    )
    del owners
    return index


def choose_pages(
    query: Tensor,
    lowest: Tensor,
    highest: Tensor,
    count: int,
    page_size: int,
    slots: int,
    key: Tensor | None,
    first: Tensor | None,
    newest: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.pages.choose_pages`."""
    batch, kv_heads, _, _ = lowest.shape
    index, places, owners = _places(batch, kv_heads, count, page_size, first, newest)
    native.built().choose_pages(
        *choice_fields(query, lowest, highest, count, page_size, slots, key, places, index.data_ptr())
    )
    del owners
    return index


def choice_fields(
    query: Tensor,
    lowest: Tensor,
    highest: Tensor,
    count: int,
    page_size: int,
    slots: int,
    key: Tensor | None,
    places: tuple[int, int],
    index: int,
    key_scale: Tensor | None = None,
) -> tuple[int, ...]:
    """The fields of `ChoosePages`; `places` are the addresses of `first` and `newest`, `key_scale [batch, kv_heads, 1]` is that of an int8
    key."""
    batch, kv_heads, pages, _ = lowest.shape
    widening = (0, 0, 0, 0) if key is None else (key.data_ptr(), native.KINDS[key.dtype], *key.stride()[:2])
    scaling = (0, 0, 0) if key_scale is None else (key_scale.data_ptr(), *key_scale.stride()[:2])
    return (
        *_score_fields(query, lowest, highest),
        0,
        batch,
        query.shape[1],
        kv_heads,
        pages,
        count,
        page_size,
        slots,
        0,
        *places,
        index,
        lowest.data_ptr(),
        highest.data_ptr(),
        *widening,
        *scaling,
        pages - 1,
        int((slots - 1) % page_size == 0),
    )


def _places(
    batch: int, kv_heads: int, count: int, page_size: int, first: Tensor | None, newest: Tensor | None
) -> tuple[Tensor, tuple[int, int], list[Tensor]]:
    """An index to fill, the addresses of `first` and `newest`, and the tensors that own them."""
    index = torch.empty(batch, kv_heads, count * page_size, dtype=torch.int64)
    if first is None and newest is None:
        return index, (0, 0), []
    owners = [
        None if given is None else native.as_int64(given.expand(batch, heads, 1)).contiguous()
        for given, heads in ((first, 1), (newest, kv_heads))
    ]
    addresses = [0 if owner is None else owner.data_ptr() for owner in owners]
    return index, (addresses[0], addresses[1]), [owner for owner in owners if owner is not None]
