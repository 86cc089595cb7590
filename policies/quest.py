"""Quest: pages whose keys may score high for this query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpress.kernels.pages import choose_pages, page_bounds
from kvpress.kernels.pages.prepared import PreparedPages
from kvpress.kernels.pages.rounding import bounds_type
from kvpress.memory import GROWTH, allocate
from kvpress.policies.base import check_integer
from kvpress.policies.selection import ALL, Every, SelectionPolicy, Selector, SlotView


@dataclass(frozen=True)
class Quest(SelectionPolicy):
    """While decoding, attends to the pages with the highest upper bound of a dot product, per KV head.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774. A page holds `page_size` slots;
    the smallest and largest value of each key channel bound every dot product in it; they are held in 16 bits. The bound is taken per
    query head, its maximum over the heads of a group ranks the pages of a KV head. The page of the newest token is always attended to, and
    counted. Prompts and the first layers attend to everything.

    Args:
        top_k: tokens attended to, in whole pages.
        page_size: slots of a page.
        skip_layers: first compressed layers that attend to everything.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "pages whose key bounds promise high scores"
    paper: ClassVar[str] = "arXiv 2406.10774"
    fails: ClassVar[str] = "answers spread thinly over many pages; budgets of few pages"
    needs: ClassVar[str] = "the query of each decoded token"

    top_k: int = 1024
    page_size: int = 16
    skip_layers: int = 2

    def __post_init__(self) -> None:
        for field, minimum in (("page_size", 1), ("skip_layers", 0)):
            check_integer(self.name, field, getattr(self, field), minimum)
        check_integer(self.name, "top_k", self.top_k, self.page_size)

    def selector(self, layer: int, ordinal: int, layers: int, shared: dict[str, Any]) -> PageSelector:
        return PageSelector(self, skip=ordinal < self.skip_layers)


class PageSelector(Selector):
    """Bounds of the pages of one layer, widened as tokens come."""

    tells_at_once = True

    def __init__(self, policy: Quest, skip: bool) -> None:
        self.policy = policy
        self.skip = skip
        self.has_index = not skip
        self.hits = self.misses = 0
        # [batch, kv_heads, room, dim] of `bounds_type`; a page without tokens has low above high
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.pages = 0  # that have bounds
        self.covered = 0  # slots whose keys the bounds include
        self._step: PreparedPages | None = None

    def rearrange(self) -> None:
        self.low = self.high = self._step = None
        self.pages = self.covered = 0

    def vacate(self) -> None:
        self.rearrange()

    def select_batch(self, index: Tensor) -> None:
        if self.low is not None and self.high is not None:
            index = index.to(self.low.device)
            self.low, self.high = self.low[index], self.high[index]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.low, self.high) if tensor is not None]

    def bytes_to_grow(self, keys: Any) -> int:
        pages = -(-keys.shape[2] // self.policy.page_size)
        if not self.narrows(keys.shape[2]) or (self.low is not None and self.low.shape[2] >= pages):
            return 0
        batch, heads, _, dim = keys.shape
        fresh: int = 2 * batch * heads * (pages + pages // GROWTH) * dim * bounds_type(keys.dtype).itemsize
        return fresh  # old bounds and new ones for a moment

    def narrows(self, slots: int) -> bool:
        return not self.skip and slots > self.policy.top_k

    def select(self, view: SlotView) -> Tensor | None:
        if not view.decoding:
            self.rearrange()  # a prompt may move the slots of earlier tokens
        if self.skip or not view.decoding or view.slots <= self.policy.top_k:
            return None
        self.misses += 1
        if view.ordered and (index := self._by_kernel(view)) is not None:
            return index
        key = self._follow(view)
        low, high = self.bounds()
        return choose_pages(
            view.query,
            low,
            high,
            self.policy.top_k // self.policy.page_size,
            page_size=self.policy.page_size,
            slots=view.slots,
            key=key,
            first=None if _begins_at_once(view) else first_tokens(view),
            newest=view.new if isinstance(view.new, Tensor) else None,
        )

    def at_once(self, query: Tensor, slots: int) -> PreparedPages | Every | None:
        if self.skip or slots <= self.policy.top_k:
            return ALL
        step, low, pages = self._step, self.low, self.covered // self.policy.page_size + 1
        if step is None or low is None or slots != self.covered + 1 or pages > low.shape[2]:
            return None
        if not step.by_kernel or not step.serves(query, low, step.keys):
            return None
        self.pages, self.covered = pages, slots
        return step

    def called(self, anew: bool) -> None:
        self.misses += 1

    def _by_kernel(self, view: SlotView) -> Tensor | None:
        """A decoded token's step over slots in order by one call of the compiled kernel, where it can serve."""
        slots, size = view.slots, self.policy.page_size
        keys, scales = view.buffer
        if keys is None or self.low is None or slots != self.covered + 1:
            return None
        low, high = self._with_room(self.covered // size + 1, self.low)
        step = self._step
        if step is None or not step.serves(view.query, low, keys):
            self._step = None
            if PreparedPages.refusal(view.query, low, high, keys) is not None:
                return None
            count = self.policy.top_k // size
            step = self._step = PreparedPages(view.query, low, high, keys, scales, count=count, page_size=size)
        self.covered = slots
        return step.choose(view.query, slots)

    def _follow(self, view: SlotView) -> Tensor | None:
        """Bring the bounds up to the slots of `view`; what is left to do is to take the key that is returned into the last page."""
        slots, size = view.slots, self.policy.page_size
        if self.low is not None and self.high is not None and isinstance(view.new, Tensor) and self.covered == slots:
            heads, dim = view.keys.shape[1], view.keys.shape[-1]
            page = (view.new // size).expand(-1, heads, -1)  # a token took an evicted one's place: its page anew
            inside = page * size + torch.arange(size, device=page.device)
            inside, outside = inside.clamp(max=slots - 1), inside >= slots
            keys = view.keys.gather(2, inside[..., None].expand(-1, -1, -1, dim))
            positions = view.positions.expand(-1, heads, -1).gather(2, inside).masked_fill(outside, -1)
            low, high = page_bounds(keys, page_size=size, positions=positions)
            page = page[..., None].expand(-1, -1, -1, dim)
            self.low.scatter_(2, page, low)
            self.high.scatter_(2, page, high)
        elif self.low is not None and view.ordered and slots == self.covered + 1:
            self._with_room(self.covered // size + 1, self.low)
            self.covered = slots
            newest: Tensor = view.keys[:, :, slots - 1 : slots]
            return newest
        elif self.low is None or self.covered != slots:
            first = 0
            if self.low is not None:  # from the first page that was not full, in whichever row
                first = max(self.covered - int(first_tokens(view).max()), 0) // size
            keys, positions = _from_first_token(view, first * size)
            low, high = page_bounds(keys, page_size=size, positions=positions)
            whole_low, whole_high = self._with_room(first + low.shape[2], low)
            whole_low[:, :, first : self.pages], whole_high[:, :, first : self.pages] = low, high
        self.covered = slots
        return None

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest keys of the pages that have bounds: `[batch, kv_heads, pages, dim]` each."""
        if self.low is None or self.high is None:
            raise RuntimeError("pages have no bounds")
        return self.low[:, :, : self.pages], self.high[:, :, : self.pages]

    def _with_room(self, pages: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of both bounds, from now on with `pages` pages; `like [batch, kv_heads, …, dim]` has the sizes of a row."""
        if self.low is None or self.high is None or self.low.shape[2] < pages:
            shape = (*like.shape[:2], pages + pages // GROWTH, like.shape[-1])
            bounds = []
            for old in (self.low, self.high):
                fresh = allocate(shape, like)
                if old is not None:
                    fresh[:, :, : self.pages] = old[:, :, : self.pages]
                bounds.append(fresh)
            self.low, self.high = bounds
        self.pages = pages
        return self.low, self.high


def _begins_at_once(view: SlotView) -> bool:
    """Whether page 0 begins at slot 0 in every row."""
    return isinstance(view.new, Tensor) or view.ordered


def first_tokens(view: SlotView) -> Tensor:
    """`[batch, 1, 1]` slot of the first token of each row: pages are counted from there, so that padding does not shift them."""
    if _begins_at_once(view):
        return torch.zeros(view.keys.shape[0], 1, 1, dtype=torch.long, device=view.keys.device)
    return (view.positions[:, :1] >= 0).int().argmax(dim=-1, keepdim=True)


def _from_first_token(view: SlotView, first: int) -> tuple[Tensor, Tensor]:
    """Keys and positions from slot `first` after each row's first token; positions are `-1` past the last slot."""
    keys, positions = view.keys, view.positions
    if _begins_at_once(view):
        return keys[:, :, first:], positions[:, :, first:]
    batch, heads, slots, dim = keys.shape
    index = first_tokens(view) + torch.arange(first, slots, device=keys.device)
    index, outside = index.clamp(max=slots - 1), index >= slots
    least = int(index.min())
    shifted = keys[:, :, least:].gather(2, (index - least)[..., None].expand(batch, heads, -1, dim))
    return shifted, positions.gather(2, index.expand(batch, positions.shape[1], -1)).masked_fill(outside, -1)
