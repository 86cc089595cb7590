"""Columns: the numbers that a slot has beside its key and value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from kvpress.memory import filled, grown

POSITION = "position"


class Columns(dict[str, Tensor]):
    """`[batch, kv_heads, capacity]` by name: int32 positions, `-1` for an empty slot, and the fp32 columns of a policy, 0 there.

    Until an eviction tells KV heads apart all of them hold the same tokens: positions are then stored once, and expanded over the heads.
    Whoever writes a column writes `stored(name)`.
    """

    @classmethod
    def empty(cls, names: Iterable[str], shape: tuple[int, int, int], like: Tensor) -> Columns:
        """Of empty slots, where `like` lies.

        Args:
            names: of the policy's columns.
        """
        batch, kv_heads, capacity = shape
        columns = {name: filled(shape, _nothing(name), like, torch.float32) for name in names}
        positions = filled((batch, 1, capacity), _nothing(POSITION), like, torch.int32)
        return cls(columns | {POSITION: positions.expand(-1, kv_heads, -1)})

    @classmethod
    def loaded(cls, columns: Mapping[str, Tensor], kv_heads: int, growing: bool) -> Columns:
        """Of a saved table: `[batch, kv_heads, capacity]`; positions of a growing one may be `[batch, 1, capacity]`.

        Args:
            growing: positions on which the heads agree are stored once; only tokens of a growing table come into the same slot of all.
        """
        own = cls(columns)
        positions = own[POSITION]
        if growing and bool((positions == positions[:, :1]).all()):
            capacity = positions.shape[2]
            own[POSITION] = grown(positions[:, :1], capacity, capacity).expand(-1, kv_heads, -1)
        return own

    def stored(self, name: str) -> Tensor:
        """The memory of a column, contiguous: `[batch, kv_heads, capacity]`, or `[batch, 1, capacity]` where all heads share it."""
        column = self[name]
        return column[:, :1] if column.stride(1) == 0 else column

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of every KV head and batch row."""
        return sum(stored.shape[0] * stored.shape[1] * stored.element_size() for stored in map(self.stored, self))

    def grown(self, count: int, capacity: int) -> Columns:
        """The first `count` slots in buffers of `capacity` slots, the others 0."""
        return self._each(lambda stored: grown(stored, count, capacity))

    def taken(self, index: Tensor, empty: Tensor | None, capacity: int) -> Columns:
        """Slots `index [batch, kv_heads, n]` in buffers of `capacity` slots, of each head its own; empty are those past `n`, and those of
        `empty`, a mask like `index`."""
        return Columns({name: _taken(name, column, index, empty, capacity) for name, column in self.items()})

    def select_batch(self, index: Tensor, length: int | None) -> Columns:
        """Row `i` becomes what row `index[i]` was, of `length` slots if it is given."""
        return self._each(lambda stored: stored[..., :length].index_select(0, index))

    def start(self, new: slice) -> None:
        """Tokens came into the slots `new`: whatever these held is gone."""
        for name in self:
            self.stored(name)[:, :, new] = 0

    def _each(self, made: Callable[[Tensor], Tensor]) -> Columns:
        """What is `made` of the memory of every column, as many heads sharing it as before."""
        return Columns({name: made(self.stored(name)).expand(-1, column.shape[1], -1) for name, column in self.items()})


def _taken(name: str, column: Tensor, index: Tensor, empty: Tensor | None, capacity: int) -> Tensor:
    nothing = _nothing(name)
    taken = column.gather(-1, index)
    fresh = filled((*index.shape[:2], capacity), nothing, column, column.dtype)
    fresh[:, :, : index.shape[2]] = taken if empty is None else taken.masked_fill(empty, nothing)
    return fresh


def _nothing(name: str) -> int:
    """What an empty slot has."""
    return -1 if name == POSITION else 0
