"""The last queries of a layer, for policies that rank all tokens by them at every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvpress.memory import filled


class RecentQueries:
    """A ring of the last `window` query rows, summed over the query heads that share keys.

    Scores are linear in the query, so the sum of a group's scores is the score of the summed query.

    Attributes:
        queries: `[batch, key heads, window, dim]`, `None` before the first; rows in no order.
        positions: `[batch, window]` int32 of those rows, `-1` for padding and rows that have not come yet.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.queries: Tensor | None = None
        self.positions: Tensor | None = None
        self.count = 0  # rows that came, padding included

    def push(self, query: Tensor, key_heads: int, positions: Tensor) -> None:
        """Add the rows of a forward: `query [batch, query_heads, rows, dim]` at `positions [batch or 1, rows]`."""
        batch, _, rows, dim = query.shape
        if self.queries is None or self.positions is None:
            self.queries = filled((batch, key_heads, self.window, dim), 0, query, query.dtype)
            self.positions = filled((batch, self.window), -1, query, torch.int32)
        taken = min(rows, self.window)
        self.count += rows
        slots = [(self.count - left) % self.window for left in range(taken, 0, -1)]
        index: slice | Tensor = slice(slots[0], slots[0] + taken)
        if slots[-1] != slots[0] + taken - 1:
            index = torch.tensor(slots, device=query.device)
        self.queries[:, :, index] = query.detach()[:, :, rows - taken :].unflatten(1, (key_heads, -1)).sum(dim=2)
        self.positions[:, index] = positions[:, rows - taken :].to(self.positions)

    def select_batch(self, index: Tensor) -> None:
        """Row `i` becomes what row `index[i]` was."""
        if self.queries is None or self.positions is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            index = index.to(self.queries.device)
            self.queries, self.positions = self.queries[index], self.positions[index]

    def state(self) -> dict[str, Any]:
        """Everything from which `load_state` makes an equal ring."""
        return {"queries": self.queries, "positions": self.positions, "count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.queries, self.positions, self.count = state["queries"], state["positions"], state["count"]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held."""
        yield from (tensor for tensor in (self.queries, self.positions) if tensor is not None)
