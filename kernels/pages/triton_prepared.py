"""Quest's step for decoded tokens on GPUs: two launches whose constant arguments are looked up once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels import triton_best
from kvpress.kernels.pages import triton_kernels
from kvpress.kernels.pages.triton import BLOCK_PAGES
from kvpress.kernels.triton_launch import PreparedLaunch
from kvpress.kernels.triton_support import on_device, power_of_two, strides

LISTED = 256  # pages listed at once


class PageLaunches:
    """`kvpress.kernels.pages.prepared.PreparedPages` on a GPU, with the same arguments."""

    def __init__(
        self,
        query: Tensor,
        lowest: Tensor,
        highest: Tensor,
        keys: Tensor,
        keys_scale: Tensor | None,
        *,
        count: int,
        page_size: int,
    ) -> None:
        batch, kv_heads, _, dim = lowest.shape
        self._pairs, self._count, self._page_size = batch * kv_heads, count, page_size
        self._shape = (batch, kv_heads, count * page_size)
        self._follow = PreparedLaunch(
            triton_kernels.follow_kernel,
            {
                "lowest": lowest, "highest": highest, "keys": keys, "keys_scale": keys_scale,
                **strides("q", query[:, :, 0], "bhd"), **strides("l", lowest, "bhsd"), **strides("u", highest, "bhsd"),
                **strides("k", keys, "bhsd"), **strides("x", keys_scale, "bhs"),
                "KV_HEADS": kv_heads, "GROUP": query.shape[1] // kv_heads, "DIM": dim, "PAGE": page_size,
                "BLOCK_N": BLOCK_PAGES, "BLOCK_D": power_of_two(dim),
            },
        )  # fmt: skip
        self._lists: dict[int, PreparedLaunch] = {}  # by how many scores a program holds

    def __call__(self, query: Tensor, slots: int) -> Tensor:
        """See `PreparedPages.choose`."""
        pages = (slots - 1) // self._page_size + 1
        index = torch.empty(self._shape, dtype=torch.int64, device=query.device)
        scores = torch.empty(self._pairs, pages, dtype=torch.float32, device=query.device)
        with on_device(query):
            self._follow((-(-pages // BLOCK_PAGES), self._pairs, 1), query=query, output=scores, slots=slots)
            self._list(pages)((self._pairs, 1, 1), scores=scores, output=index, pages=pages, slots=slots)
        return index

    def _list(self, pages: int) -> PreparedLaunch:
        """What lists the best of so many pages."""
        constants = triton_best.best_arguments(pages) | {"TILE": LISTED}
        kind = constants["BLOCK"] + constants["ONCE"]
        found = self._lists.get(kind)
        if found is None:
            page = {"PAGE": self._page_size, "BLOCK_P": power_of_two(self._page_size)}
            arguments = {"count": self._count, **page, **constants, "num_warps": triton_best.WARPS}
            found = self._lists[kind] = PreparedLaunch(triton_kernels.list_pages_kernel, arguments)
        return found
