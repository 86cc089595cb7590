"""What the compiled kernels need to know to evict a slot a head after each decoded token."""

from __future__ import annotations

import struct
from array import array

import torch
from torch import Tensor

from kvpress.kernels.native import tensors as fields


class PreparedEviction:
    """Each head's token takes its spare slot; what attention leaves is added to a column; the slot of the lowest sum is spare from then on.

    Ties and protected tokens are those of `kvpress.kernels.eviction.weakest`.

    Args:
        positions: `[batch, kv_heads, slots]` int32, written to; every slot but the spare ones holds a token.
        column: `[batch, kv_heads, slots]` fp32, written to; `None`: the oldest token goes.
        spare: `[batch, kv_heads, 1]` int64, written to.
        sinks, windows: how many of the first and the last tokens stay: numbers, or `[batch, kv_heads, 1]` int64.
        fade: factor of the column at each token.
        starts, lengths: `[batch, kv_heads]` int64, where heads are ragged: the first row of each in flat keys and values, and its slots.

    Raises:
        ValueError: tensors that the compiled kernels do not serve.
    """

    def __init__(
        self,
        positions: Tensor,
        column: Tensor | None,
        spare: Tensor,
        *,
        sinks: int | Tensor,
        windows: int | Tensor,
        fade: float,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        reason = self.refusal(positions, column)
        if reason is not None:
            raise ValueError(f"an eviction cannot be prepared: {reason}")
        self.spare, self.starts = spare, starts
        sinks, windows = (each if isinstance(each, int) else fields.as_int64(each) for each in (sinks, windows))
        self._owned = (sinks, windows, lengths)  # the kernels know their addresses
        batch, heads, slots = positions.shape
        first, first_number = _limit(sinks)
        recent, recent_number = _limit(windows)
        weakest = (
            batch, heads, slots,
            0 if column is None else column.data_ptr(), heads * slots, slots,
            positions.data_ptr(), positions.element_size(), heads * slots, slots,
            0 if lengths is None else lengths.data_ptr(),
            first, recent, first_number, recent_number, spare.data_ptr(),
        )  # fmt: skip
        self.call = array("q", weakest)
        self.call.frombytes(struct.pack("=d", fade))

    @staticmethod
    def refusal(positions: Tensor, column: Tensor | None) -> str | None:
        """Why there can be no such eviction, or `None`."""
        if not positions.is_cpu:
            return "native kernels read host memory only"
        if positions.dtype != torch.int32 or not positions.is_contiguous():
            return f"positions must be contiguous int32, got {positions.dtype}"
        if column is None:
            return None
        if column.dtype != torch.float32 or not column.is_contiguous() or column.shape != positions.shape:
            return f"the column must be contiguous fp32 of {tuple(positions.shape)}, got {column.dtype} of {tuple(column.shape)}"
        return None

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [each for each in (self.spare, self.starts, *self._owned) if isinstance(each, Tensor)]


def _limit(limit: int | Tensor) -> tuple[int, int]:
    """The address of each head's own, or one number for all."""
    return (0, limit) if isinstance(limit, int) else (limit.data_ptr(), 0)
