"""Columns: the numbers that a slot has beside its key and value."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvpress.memory import filled, grown

POSITION = "position"


class Columns(dict[str, Tensor]):
    """`[batch, kv_heads, capacity]` by name: int32 positions, `-1` for an empty slot, and the fp32 columns of a policy, 0 there."""

    @classmethod
    def empty(cls, names: Iterable[str], shape: tuple[int, int, int], like: Tensor) -> Columns:
        """Of empty slots, where `like` lies.

        Args:
            names: of the policy's columns.
        """
        dtypes = {name: torch.float32 for name in names} | {POSITION: torch.int32}
        return cls({name: filled(shape, _nothing(name), like, dtype) for name, dtype in dtypes.items()})

    def grown(self, count: int, capacity: int) -> Columns:
        """The first `count` slots in buffers of `capacity` slots, the others 0."""
        return Columns({name: grown(column, count, capacity) for name, column in self.items()})

    def taken(self, index: Tensor, empty: Tensor | None, capacity: int) -> Columns:
        """Slots `index [batch, kv_heads, n]` in buffers of `capacity` slots; empty are those past `n`, and those of `empty`, a mask like
        `index`."""
        return Columns({name: _taken(name, column, index, empty, capacity) for name, column in self.items()})

    def select_batch(self, index: Tensor, length: int | None) -> Columns:
        """Row `i` becomes what row `index[i]` was, of `length` slots if it is given."""
        return Columns({name: column[..., :length].index_select(0, index) for name, column in self.items()})

    def start(self, new: slice) -> None:
        """Tokens came into the slots `new`: whatever these held is gone."""
        for column in self.values():
            column[:, :, new] = 0


def _taken(name: str, column: Tensor, index: Tensor, empty: Tensor | None, capacity: int) -> Tensor:
    nothing = _nothing(name)
    taken = column.gather(-1, index)
    fresh = filled((*index.shape[:2], capacity), nothing, column, column.dtype)
    fresh[:, :, : index.shape[2]] = taken if empty is None else taken.masked_fill(empty, nothing)
    return fresh


def _nothing(name: str) -> int:
    """What an empty slot has."""
    return -1 if name == POSITION else 0
