"""Rows of heads that are not equally long, in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

from kvpress.memory import allocate


class RaggedRows:
    """Where the slots of each head lie in flat buffers `[rows, dim]`.

    Attributes:
        capacities: `[batch, kv_heads]` slots of each head, on the host.
        starts, lengths: `[batch, kv_heads]` int64 on the device: first row of each head, and its slots.
        outside: `[batch, kv_heads, longest]` bool: past a head's slots.
    """

    def __init__(self, capacities: numpy.ndarray, device: torch.device) -> None:
        self.capacities = capacities.astype(numpy.int64)
        ends = self.capacities.reshape(-1).cumsum().reshape(self.capacities.shape)
        self.total = int(self.capacities.sum())
        self.starts = torch.from_numpy(ends - self.capacities).to(device)
        self.lengths = torch.from_numpy(self.capacities).to(device)
        slot = torch.arange(int(self.capacities.max()), device=device)
        self.outside = slot >= self.lengths[..., None]

    def padded(self, flat: Tensor) -> Tensor:
        """`[rows, dim]` to a dense copy `[batch, kv_heads, longest, dim]`, 0 past each head's length."""
        slot = torch.arange(self.outside.shape[-1], device=flat.device)
        rows = (self.starts[..., None] + slot).masked_fill(self.outside, 0)
        return flat[rows].masked_fill(self.outside[..., None], 0)

    def flattened(self, dense: Tensor, source: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """Flat rows whose slot `s` of head `[b, h]` is `dense[b, h, source[b, h, s]]`, packed, for every slot inside a head's capacity."""
        batch, head, slot = self._cells()
        cells = [torch.from_numpy(cell).to(dense.device) for cell in (batch, head, slot)]
        rows = pack(dense[cells[0], cells[1], source[cells[0], cells[1], cells[2]]])
        buffer = allocate((self.total, rows.shape[-1]), rows)
        buffer.copy_(rows)
        return buffer

    def select_batch(self, index: Sequence[int], device: torch.device) -> tuple[RaggedRows, Tensor]:
        """The layout with row `i` taken from row `index[i]`, and the flat rows to take, in the new order."""
        selected = RaggedRows(self.capacities[list(index)], device)
        batch, head, slot = selected._cells()
        old = numpy.array(index, dtype=numpy.int64)[batch]
        first = self.starts[torch.from_numpy(old).to(device), torch.from_numpy(head).to(device)]
        return selected, first + torch.from_numpy(slot).to(device)

    def _cells(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Batch row, head and slot of every flat row."""
        flat = self.capacities.reshape(-1)
        owner = numpy.repeat(numpy.arange(flat.size), flat)
        first = flat.cumsum() - flat
        slot = numpy.arange(self.total) - first[owner]
        return owner // self.capacities.shape[1], owner % self.capacities.shape[1], slot
