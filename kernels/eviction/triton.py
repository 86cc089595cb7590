"""Eviction of one slot a head on GPUs: the launch of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress.kernels.eviction import triton_kernels
from kvpress.kernels.triton_support import on_device, power_of_two, strides

BLOCK_SLOTS = 1024
COLUMNS = 3  # written in one launch


def weakest(
    scores: Tensor,
    positions: Tensor,
    sinks: int | Tensor,
    first_recent: int | Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """See `kvpress.kernels.eviction.weakest`."""
    batch, kv_heads, slots = torch.broadcast_shapes(scores.shape, positions.shape)
    output = torch.empty(batch, kv_heads, dtype=torch.int64, device=scores.device)
    limits = [limit[..., 0] if isinstance(limit, Tensor) else None for limit in (sinks, first_recent)]
    numbers = [limit if isinstance(limit, int) else 0 for limit in (sinks, first_recent)]
    if output.numel():
        with on_device(scores):
            triton_kernels.weakest_kernel[(batch * kv_heads,)](
                scores, positions, *limits, lengths, output, *numbers, slots,
                **strides("s", scores, "bhs"), **strides("p", positions, "bhs"),
                **strides("i", limits[0], "bh"), **strides("r", limits[1], "bh"), **strides("l", lengths, "bh"),
                HEADS=kv_heads, WINDOW=first_recent is not None,
                BLOCK_N=min(BLOCK_SLOTS, max(16, power_of_two(slots))),
            )  # fmt: skip
    return output


def write(
    columns: Sequence[Tensor], rows: Sequence[Tensor], slot: Tensor, heads: tuple[int, int], starts: Tensor | None
) -> None:
    """`columns[i][b, h, slot[b, h]] = rows[i][b, h]`, in place, three columns a launch; a slot of -1 writes nothing.

    Args:
        columns, rows, slot, heads, starts: as of `kvpress.kernels.eviction.RowWriter`; `rows` for the first of the columns, or all.
    """
    batch, kv_heads = heads
    leading = 1 if starts is not None else 3
    for first in range(0, len(rows), COLUMNS):
        some = list(zip(columns[first:], rows[first : first + COLUMNS], strict=False))
        missing = COLUMNS - len(some)
        dims = [column.shape[-1] if column.dim() > leading else 1 for column, _ in some] + [1] * missing
        pairs = [tensor for pair in some for tensor in pair] + [None, None] * missing
        steps = [
            step if size == count else 0
            for _, row in some
            for step, size, count in zip(row.stride()[:2], row.shape[:2], heads, strict=True)
        ]
        with on_device(slot):
            triton_kernels.write_kernel[(batch * kv_heads,)](
                slot, starts, *pairs, columns[first].shape[leading - 1], *steps, *[0, 0] * missing,
                kv_heads, *dims, *map(power_of_two, dims),
            )  # fmt: skip
