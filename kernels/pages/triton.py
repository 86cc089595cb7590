"""Pages on GPUs: bounds of the keys of each page, and the scores that bound a query's dot products over a page (arXiv
2406.10774).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.pages import triton_kernels
from kvpress.kernels.pages.rounding import bounds_type
from kvpress.kernels.triton_support import on_device, power_of_two, strides

BLOCK_PAGES = 32
MOST_PAGE = 128  # slots of a page that a program holds in registers


def page_bounds(keys: Tensor, *, page_size: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.pages.page_bounds`.

    Raises:
        ValueError: pages of more slots than a program holds.
    """
    if not 1 <= page_size <= MOST_PAGE:
        raise ValueError(f"page_size must be from 1 to {MOST_PAGE}, got {page_size}")
    batch, kv_heads, slots, dim = keys.shape
    pages = -(-slots // page_size)
    lowest = keys.new_empty(batch, kv_heads, pages, dim, dtype=bounds_type(keys.dtype))
    highest = torch.empty_like(lowest)
    if lowest.numel():
        with on_device(keys):
            triton_kernels.bounds_kernel[(pages, batch * kv_heads)](
                keys, positions, lowest, highest, slots, pages,
                **strides("k", keys, "bhsd"), **strides("p", positions, "bhs"),
                KV_HEADS=kv_heads, DIM=dim, PAGE=page_size,
                BLOCK_P=power_of_two(page_size), BLOCK_D=power_of_two(dim),
            )  # fmt: skip
    return lowest, highest


def page_scores(query: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """See `kvpress.kernels.pages.page_scores`.

    Raises:
        ValueError: more than one query row.
    """
    if query.shape[2] != 1:
        raise ValueError(f"query must have a single row to score pages, got {query.shape[2]}")
    batch, query_heads, _, dim = query.shape
    kv_heads, pages = lowest.shape[1:3]
    scores = query.new_empty(batch, query_heads, pages, dtype=torch.float32)
    if scores.numel():
        with on_device(query):
            triton_kernels.score_kernel[(-(-pages // BLOCK_PAGES), batch * kv_heads)](
                query, lowest, highest, scores, pages,
                **strides("q", query[:, :, 0], "bhd"), **strides("l", lowest, "bhsd"), **strides("u", highest, "bhsd"),
                KV_HEADS=kv_heads, GROUP=query_heads // kv_heads, DIM=dim,
                BLOCK_N=BLOCK_PAGES, BLOCK_D=power_of_two(dim),
            )  # fmt: skip
    return scores
