"""Eviction of one slot a head on GPUs: the launch of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.eviction import triton_kernels
from kvpress.kernels.triton_launch import PreparedLaunch
from kvpress.kernels.triton_support import ALIGNED, on_device, power_of_two, strides

BLOCK_SLOTS = 1024
COLUMNS = 3  # written in one launch
ROWS = tuple(f"row_{number}" for number in range(COLUMNS))


def weakest(
    scores: Tensor,
    positions: Tensor,
    sinks: int | Tensor,
    first_recent: int | Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.eviction.weakest`."""
    return PreparedWeakest(scores, positions, sinks, first_recent, lengths).find(scores, sinks, first_recent)


class PreparedWeakest:
    """`weakest` of scores of one kind, and of limits that are integers, or tensors of one kind.

    Args:
        scores, positions, sinks, first_recent, lengths: as of `kvpress.kernels.eviction.weakest`; every later call reads the positions and
            lengths that lie there then.
    """

    def __init__(
        self,
        scores: Tensor,
        positions: Tensor,
        sinks: int | Tensor,
        first_recent: int | Tensor | None,
        lengths: Tensor | None,
    ) -> None:
        self._heads = batch, kv_heads = torch.broadcast_shapes(scores.shape, positions.shape)[:2]
        slots = positions.shape[-1]
        limits = [_limit(limit)[0] for limit in (sinks, first_recent)]
        self._launch = PreparedLaunch(
            triton_kernels.weakest_kernel,
            dict(
                positions=positions, lengths=lengths, slots=slots,
                **strides("s", scores, "bhs"), **strides("p", positions, "bhs"),
                **strides("i", limits[0], "bh"), **strides("r", limits[1], "bh"), **strides("l", lengths, "bh"),
                HEADS=kv_heads, WINDOW=first_recent is not None,
                BLOCK_N=min(BLOCK_SLOTS, max(16, power_of_two(slots))),
            ),
        )  # fmt: skip
        self._grid = (batch * kv_heads, 1, 1)

    def find(self, scores: Tensor, sinks: int | Tensor, first_recent: int | Tensor | None) -> Tensor:
        """The slot of each head, `[batch, kv_heads]` int64."""
        output = torch.empty(self._heads, dtype=torch.int64, device=scores.device)
        if output.numel():
            first, first_number = _limit(sinks)
            recent, recent_number = _limit(first_recent)
            with on_device(scores):
                self._launch(
                    self._grid, scores=scores, output=output, sinks=first, sinks_number=first_number,
                    first_recent=recent, first_recent_number=recent_number,
                )  # fmt: skip
        return output


def _limit(limit: int | Tensor | None) -> tuple[Tensor | None, int]:
    """Of each head `[batch or 1, kv_heads or 1]`, or one number for all."""
    return (limit[..., 0], 0) if isinstance(limit, Tensor) else (None, limit or 0)


class PreparedWrite:
    """`columns[i][b, h, slot[b, h]] = rows[i][b, h]`, in place, three columns a launch; a slot of -1 writes nothing.

    Args:
        columns, heads, starts: as of `kvpress.kernels.eviction.RowWriter`.
    """

    def __init__(self, columns: Sequence[Tensor], heads: tuple[int, int], starts: Tensor | None) -> None:
        self._columns, self._heads, self._starts = list(columns), heads, starts
        self._grid = (heads[0] * heads[1], 1, 1)
        self._launches: dict[tuple[object, ...], list[PreparedLaunch]] = {}

    def write(self, slot: Tensor | int, rows: Sequence[Tensor]) -> None:
        """Write `rows`, for the first of the columns, or all."""
        rows = [row if row.dim() < 4 or row.stride(-1) == 1 else row.contiguous() for row in rows]
        aligned = None if isinstance(slot, int) else slot.data_ptr() % ALIGNED
        kind = (aligned, *[(row.shape, row.stride(), row.data_ptr() % ALIGNED) for row in rows])
        place, number = (None, slot) if isinstance(slot, int) else (slot, 0)
        launches = self._launches.get(kind)
        if launches is None:
            launches = self._launches[kind] = [
                self._prepare(first, rows[first : first + COLUMNS]) for first in range(0, len(rows), COLUMNS)
            ]
        with on_device(rows[0]):
            for part, launch in enumerate(launches):
                some = rows[COLUMNS * part : COLUMNS * (part + 1)]
                launch(self._grid, slot=place, number=number, **dict(zip(ROWS, some, strict=False)))

    def _prepare(self, first: int, rows: Sequence[Tensor]) -> PreparedLaunch:
        leading = 1 if self._starts is not None else 3
        arguments: dict[str, Any] = {"starts": self._starts, "HEADS": self._heads[1]}
        arguments["slots"] = self._columns[first].shape[leading - 1]
        for number in range(COLUMNS):
            column = row = None
            if number < len(rows):
                column, row = self._columns[first + number], rows[number]
            else:
                arguments[ROWS[number]] = None
            dim = column.shape[-1] if column is not None and column.dim() > leading else 1
            arguments |= {f"column_{number}": column, f"DIM_{number}": dim, f"BLOCK_{number}": power_of_two(dim)}
            for axis, letter in enumerate("bh"):
                varies = row is not None and row.shape[axis] == self._heads[axis]
                arguments[f"stride_{number}{letter}"] = row.stride(axis) if row is not None and varies else 0
        return PreparedLaunch(triton_kernels.write_kernel, arguments)
