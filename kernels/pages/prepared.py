"""Quest's step for decoded tokens, in one call: what is the same at every token is looked up once."""

from __future__ import annotations

from array import array
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.native import tensors as fields
from kvpress.kernels.pages import native
from kvpress.kernels.pages.rounding import bounds_type
from kvpress.kernels.query_kind import QueryKind

# places among the fields of `ChoosePages` in `arguments.hpp`
THREADS, SCORED_PAGES, QUERY, PAGES, SLOTS, INDEX, KEY, KEY_SCALE, PAGE, BEGINS = 0, 4, 6, 23, 26, 30, 33, 37, 40, 41

# types in which rows may be stored that the model's type holds as they are
_EXACT = {torch.float32: (torch.bfloat16, torch.float16, torch.int8)}


class PreparedPages:
    """`choose_pages` with the key of the newest token, over slots in order whose memory stays where it is.

    Args:
        query: `[batch, query_heads, 1, dim]`, like those that will be asked for.
        lowest, highest: `[batch, kv_heads, room, dim]`: bounds of the pages in use come first.
        keys: `[batch, kv_heads, room, dim]`, as they are stored: those of the slots in use come first.
        keys_scale: `[batch, kv_heads, room]` fp32, of int8 keys.
        count: pages to choose.
        page_size: slots a page.

    Attributes:
        shape: of the lists.
        by_kernel: by the compiled kernel, which `call_for` serves.

    Raises:
        ValueError: tensors that `refusal` would name; int8 keys without their scales.
    """

    def __init__(
        self,
        query: Tensor,
        lowest: Tensor,
        highest: Tensor,
        keys: Tensor,
        keys_scale: Tensor | None = None,
        *,
        count: int,
        page_size: int,
    ) -> None:
        reason = self.refusal(query, lowest, highest, keys)
        if reason is not None:
            raise ValueError(f"a choice of pages cannot be prepared: {reason}")
        if keys.dtype == torch.int8 and keys_scale is None:
            raise ValueError("keys_scale must be given for int8 keys, got None")
        self.lowest, self.highest, self.keys, self.keys_scale = lowest, highest, keys, keys_scale
        self._kind = QueryKind(query)
        self._count, self._page_size = count, page_size
        batch, kv_heads, _, _ = lowest.shape
        self.shape = (batch, kv_heads, count * page_size)
        self._launches: Any = None  # on a GPU, in place of the fields
        self.by_kernel = not (query.is_cuda or triton_support.interpreted())
        if not self.by_kernel:
            self._launches = import_module("kvpress.kernels.pages.triton_prepared").PageLaunches(
                query, lowest, highest, keys, keys_scale, count=count, page_size=page_size
            )
            return
        self._first_key, self._key_bytes = keys.data_ptr(), keys.stride(2) * keys.element_size()
        self._first_scale, self._scale_bytes = 0, 0
        newest, scale = keys[:, :, :1], None
        if keys_scale is not None:
            self._first_scale, self._scale_bytes = keys_scale.data_ptr(), keys_scale.stride(2) * 4
            scale = keys_scale[:, :, :1]
        found = native.choice_fields(
            query, lowest, highest, count, page_size, slots=1, key=newest, places=(0, 0), index=0, key_scale=scale
        )
        self._fields = array("q", found)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of copied pages there is none yet: addresses are those of the original."""

    @staticmethod
    def refusal(query: Tensor, lowest: Tensor, highest: Tensor, keys: Tensor) -> str | None:
        """Why neither the compiled kernel nor those of GPUs can serve such calls, or `None`."""
        if bounds_type(query.dtype) != lowest.dtype:
            return f"bounds of {query.dtype} keys are {bounds_type(query.dtype)}, got {lowest.dtype}"
        if keys.dtype not in (query.dtype, *_EXACT.get(query.dtype, ())):
            return f"keys stored as {keys.dtype} are rounded to the model's {query.dtype}"
        if query.is_cuda or triton_support.interpreted():
            return triton_support.refusal(query, lowest, highest, keys) or triton_support.storage_refusal(keys)
        return native.choice_refusal(query, lowest, highest, keys)

    def serves(self, query: Tensor, lowest: Tensor, keys: Tensor) -> bool:
        """Whether a call with `query` is of the kind that was prepared, and bounds and keys are those."""
        return keys is self.keys and lowest is self.lowest and self._kind.serves(query)

    def choose(self, query: Tensor, slots: int) -> Tensor:
        """Take the key in slot `slots - 1` into the bounds of its page, and list the slots of the best pages: `[batch, kv_heads, count *
        page_size]` int64, as `choose_pages`.

        Raises:
            ValueError: fewer pages than are chosen, or more than there is room for.
        """
        last = (slots - 1) // self._page_size
        if not self._count <= last + 1 <= self.lowest.shape[2]:
            raise ValueError(
                f"slots must make {self._count} to {self.lowest.shape[2]} pages of {self._page_size}, got {slots}"
            )
        if self._launches is not None:
            listed: Tensor = self._launches(query, slots)
            return listed
        index = torch.empty(self.shape, dtype=torch.int64)
        fields.built().choose_pages_again(self.call_for(query.data_ptr(), slots, index.data_ptr()))
        return index

    def call_for(self, query: int, slots: int, index: int) -> array[int]:
        """The fields of the compiled kernel's call that writes the list to the address `index`, of a query at the address `query`."""
        call, last = self._fields, (slots - 1) // self._page_size
        call[THREADS], call[QUERY], call[INDEX] = torch.get_num_threads(), query, index
        call[SCORED_PAGES] = call[PAGES] = last + 1
        call[SLOTS], call[PAGE], call[BEGINS] = slots, last, (slots - 1) % self._page_size == 0
        call[KEY] = self._first_key + (slots - 1) * self._key_bytes
        call[KEY_SCALE] = self._first_scale + (slots - 1) * self._scale_bytes
        return call
