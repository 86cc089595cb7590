"""Pages by the compiled CPU kernels (`kernels/native/pages.hpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.choosing.native import scores_refusal
from kvpress.kernels.native import tensors as native

__all__ = ["page_bounds", "page_scores", "page_slots", "refusal", "scores_refusal"]


def refusal(query: Tensor, *bounds: Tensor) -> str | None:
    """Why this implementation cannot serve, or `None`."""
    first, last = bounds[0], bounds[-1]
    return native.refusal(query, first, last) or (
        "native pages take fp32, bf16 and fp16, not int8" if first.dtype not in native.FLOATS else None
    )


def page_bounds(keys: Tensor, page_size: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.pages.page_bounds`."""
    batch, kv_heads, slots, dim = keys.shape
    lowest = torch.empty(batch, kv_heads, -(-slots // page_size), dim, dtype=keys.dtype)
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
    )
    return lowest, highest


def page_scores(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """See `kvpress.kernels.pages.page_scores`."""
    batch, query_heads, _, dim = query.shape
    kv_heads, pages = lowest.shape[1:3]
    scores = torch.empty(batch, query_heads, pages, dtype=torch.float32)
    native.built().page_scores(
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
        scores.data_ptr(),
    )
    return scores


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
    index = torch.empty(batch, kv_heads, count * page_size, dtype=torch.int64)
    if first is not None:
        first = native.as_int64(first).contiguous()
    if newest is not None:
        newest = native.as_int64(newest.expand(batch, kv_heads, 1)).contiguous()
    native.built().page_slots(
        batch,
        query_heads,
        kv_heads,
        pages,
        count,
        page_size,
        slots,
        scores.data_ptr(),
        0 if first is None else first.data_ptr(),
        0 if newest is None else newest.data_ptr(),
        index.data_ptr(),
    )
    return index
