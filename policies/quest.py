"""Quest: pages whose keys may score high for this query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpress.kernels.scores import accumulator_type
from kvpress.policies.base import check_integer
from kvpress.policies.selection import SelectionPolicy, Selector, SlotView, best_slots


@dataclass(frozen=True)
class Quest(SelectionPolicy):
    """While decoding, attends to the pages with the highest upper bound of a dot product, per KV head.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774. A page holds `page_size` slots;
    the smallest and largest value of each key channel bound every dot product in it. The bound is taken per query head, its maximum over
    the heads of a group ranks the pages of a KV head. The page of the newest token is always attended to, and counted. Prompts and the
    first layers attend to everything.

    Args:
        top_k: tokens attended to, in whole pages.
        page_size: slots of a page.
        skip_layers: first compressed layers that attend to everything.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "pages whose key bounds promise high scores"
    paper: ClassVar[str] = "arXiv 2406.10774"
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

    def __init__(self, policy: Quest, skip: bool) -> None:
        self.policy = policy
        self.skip = skip
        self.hits = self.misses = 0
        self.low: Tensor | None = None  # [batch, kv_heads, pages, dim]; a page without tokens has low above high
        self.high: Tensor | None = None
        self.covered = 0  # slots whose keys the bounds include

    def rearrange(self) -> None:
        self.low = self.high = None
        self.covered = 0

    def vacate(self) -> None:
        self.rearrange()

    def select_batch(self, index: Tensor) -> None:
        if self.low is not None and self.high is not None:
            index = index.to(self.low.device)
            self.low, self.high = self.low[index], self.high[index]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.low, self.high) if tensor is not None]

    def select(self, view: SlotView) -> Tensor | None:
        if not view.decoding:
            self.rearrange()  # a prompt may move the slots of earlier tokens
        if self.skip or not view.decoding or view.keys.shape[2] <= self.policy.top_k:
            return None
        self.misses += 1
        low, high = self._bounds(view)
        size, slots = self.policy.page_size, view.keys.shape[2]
        batch, _, _, dim = view.query.shape
        grouped = view.query.to(accumulator_type(view.query)).view(batch, view.keys.shape[1], -1, dim)
        bound = page_bounds_score(grouped, low, high).amax(dim=2)  # [batch, kv_heads, pages]
        bound = bound.masked_fill(bound.isnan(), -torch.inf)
        offset = first_tokens(view)
        newest = view.new if isinstance(view.new, Tensor) else slots - 1 - offset
        newest = newest.expand(*bound.shape[:2], 1)
        bound = bound.scatter(-1, newest // size, torch.inf)
        pages = best_slots(bound, self.policy.top_k // size)
        pages = pages.masked_fill(bound.gather(-1, pages) == -torch.inf, slots)  # past the end: no slot
        index = (pages[..., None] * size + torch.arange(size, device=pages.device)).flatten(-2) + offset
        return index.masked_fill(index >= slots, -1)

    def _bounds(self, view: SlotView) -> tuple[Tensor, Tensor]:
        slots, size = view.keys.shape[2], self.policy.page_size
        if self.low is not None and self.high is not None and isinstance(view.new, Tensor) and self.covered == slots:
            heads, dim = view.keys.shape[1], view.keys.shape[-1]
            page = (view.new // size).expand(-1, heads, -1)  # a token took an evicted one's place: its page anew
            inside = page * size + torch.arange(size, device=page.device)
            inside, outside = inside.clamp(max=slots - 1), inside >= slots
            keys = view.keys.gather(2, inside[..., None].expand(-1, -1, -1, dim))
            positions = view.positions.expand(-1, heads, -1).gather(2, inside).masked_fill(outside, -1)
            low, high = page_bounds(keys, positions, size)
            page = page[..., None].expand(-1, -1, -1, dim)
            self.low.scatter_(2, page, low)
            self.high.scatter_(2, page, high)
        elif self.low is None or self.high is None or self.covered != slots:
            first = 0
            if self.low is not None:  # from the first page that was not full, in whichever row
                first = max(self.covered - int(first_tokens(view).max()), 0) // size
            low, high = page_bounds(*_from_first_token(view, first * size), size)
            if self.low is not None and self.high is not None:
                low = torch.cat([self.low[:, :, :first], low], dim=2)
                high = torch.cat([self.high[:, :, :first], high], dim=2)
            self.low, self.high, self.covered = low, high, slots
        if self.low is None or self.high is None:
            raise RuntimeError("pages have no bounds")
        return self.low, self.high


def first_tokens(view: SlotView) -> Tensor:
    """`[batch, 1, 1]` slot of the first token of each row: pages are counted from there, so that padding does not shift them."""
    if isinstance(view.new, Tensor) or view.ordered:
        return torch.zeros(view.keys.shape[0], 1, 1, dtype=torch.long, device=view.keys.device)
    return (view.positions[:, :1] >= 0).int().argmax(dim=-1, keepdim=True)


def _from_first_token(view: SlotView, first: int) -> tuple[Tensor, Tensor]:
    """Keys and positions from slot `first` after each row's first token; positions are `-1` past the last slot."""
    keys, positions = view.keys, view.positions
    if isinstance(view.new, Tensor) or view.ordered:
        return keys[:, :, first:], positions[:, :, first:]
    batch, heads, slots, dim = keys.shape
    index = first_tokens(view) + torch.arange(first, slots, device=keys.device)
    index, outside = index.clamp(max=slots - 1), index >= slots
    shifted = keys.gather(2, index[..., None].expand(batch, heads, -1, dim))
    return shifted, positions.gather(2, index.expand(batch, positions.shape[1], -1)).masked_fill(outside, -1)


def page_bounds(keys: Tensor, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel over the tokens of each page of `size` slots.

    Both are `[batch, kv_heads, pages, dim]` in the type of `keys`; a page without tokens has its smallest above its largest.
    """
    empty = (positions < 0)[..., None]
    padding = (0, 0, 0, -keys.shape[2] % size)
    low = torch.nn.functional.pad(keys.masked_fill(empty, torch.inf), padding, value=torch.inf)
    high = torch.nn.functional.pad(keys.masked_fill(empty, -torch.inf), padding, value=-torch.inf)
    pages = (*keys.shape[:2], low.shape[2] // size, size, keys.shape[-1])
    return low.view(pages).amin(dim=3), high.view(pages).amax(dim=3)


def page_bounds_score(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`sum_channels max(q * low, q * high)`: `[batch, kv_heads, group, pages]`, `-inf` for a page without tokens."""
    empty = low[..., 0] > high[..., 0]
    low, high = low.masked_fill(empty[..., None], 0), high.masked_fill(empty[..., None], 0)
    low, high = low.to(query.dtype), high.to(query.dtype)
    score = query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
    return score.masked_fill(empty[:, :, None], -torch.inf)
