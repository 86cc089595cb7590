"""A writer for a fixed set of columns: what is the same for every decoded token is looked up once."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain

import torch
from torch import Tensor

from kvpress.kernels import triton_support
from kvpress.kernels.dispatch import choose
from kvpress.kernels.native import missing
from kvpress.kernels.native import tensors as native

COLUMNS = 16  # that the compiled kernel writes at once
FIELDS, SLOT = 14, 9  # of `Overwrite` in `arguments.hpp`; those of a row begin with the address of the slots


class RowWriter:
    """Writes one new row per head into every column, in place: `columns[i][b, h, slot[b, h]] = rows[i][b, h]`.

    On the CPU by the compiled kernel, on GPUs by Triton's; elsewhere, and while `torch.compile` traces, by `index_copy_`.

    Args:
        columns: contiguous, `[batch, kv_heads, slots]` or `[batch, kv_heads, slots, dim]` each; or flat, `[rows]` or
            `[rows, dim]`, with `starts`.
        starts: `[batch, kv_heads]` int64, of the flat layout.
        heads: `(batch, kv_heads)`.
        impl: `"auto"`, `"native"`, `"triton"` or `"reference"`.

    Raises:
        ValueError: columns that are not contiguous, or an `impl` that cannot serve them.
    """

    def __init__(
        self, columns: Sequence[Tensor], heads: tuple[int, int], starts: Tensor | None = None, impl: str = "auto"
    ) -> None:
        if not all(column.is_contiguous() for column in columns):
            raise ValueError("columns must be contiguous")
        self.columns = list(columns)
        self.heads = heads
        self.starts = starts
        self._first_rows: Tensor | None = None
        refusals = {"native": self._native_refusal, "triton": self._triton_refusal, "reference": lambda: None}
        compiling = impl == "auto" and torch.compiler.is_compiling()
        self._impl = "reference" if compiling else choose("writing of rows", impl, refusals)
        self._calls: dict[int, array[int]] = {}  # by the number of columns written
        if self._impl == "native":
            each = [self._field(column) for column in columns]
            self._calls = {count: array("q", chain.from_iterable(each[:count])) for count in {1, len(columns)}}
        if self._impl == "triton":
            self._launches = import_module("kvpress.kernels.eviction.triton").PreparedWrite(columns, heads, starts)

    def write(self, slot: Tensor | int, rows: Sequence[Tensor]) -> None:
        """Write `rows`.

        Args:
            slot: `[batch, kv_heads, 1]` int64, contiguous; or one number for all heads.
            rows: for the first of the columns, or all: `[batch, kv_heads]`, or `[batch, kv_heads, 1, dim]`, of the
                column's type; sizes of 1 stand for all.

        Raises:
            IndexError: a slot that does not exist; columns before it may be written. (On GPUs a slot of -1 is passed over.)
        """
        if self._impl == "reference" or torch.compiler.is_compiling():
            self._index_copy(slot, rows)
            return
        if self._impl == "triton":
            self._launches.write(slot, rows)
            return
        call = self._calls[len(rows)]
        place, same = (0, slot) if isinstance(slot, int) else (slot.data_ptr(), 0)
        batch, kv_heads = self.heads
        at, copies = SLOT, []
        for row in rows:
            strides, shape, item = row.stride(), row.shape, row.element_size()
            if len(shape) == 4 and strides[3] != 1:
                row = row.contiguous()
                copies.append(row)  # it must outlive the call
                strides = row.stride()
            call[at], call[at + 1], call[at + 4] = place, row.data_ptr(), same
            call[at + 2] = strides[0] * item if shape[0] == batch else 0
            call[at + 3] = strides[1] * item if shape[1] == kv_heads else 0
            at += FIELDS
        native.built().overwrite_again(call)

    def tensors(self) -> Iterator[Tensor]:
        """What is held beside the columns and `starts`."""
        if self._first_rows is not None:
            yield self._first_rows

    def _native_refusal(self) -> str | None:
        if len(self.columns) > COLUMNS:
            return f"native kernels write up to {COLUMNS} columns, not {len(self.columns)}"
        return missing or (
            None if all(column.is_cpu for column in self.columns) else "native kernels read host memory only"
        )

    def _triton_refusal(self) -> str | None:
        return triton_support.refusal(*self.columns) if self.columns else "there is no column"

    def _field(self, column: Tensor) -> tuple[int, ...]:
        """The fields of `Overwrite`, those of a row left open."""
        item, (batch, kv_heads) = column.element_size(), self.heads
        leading = 1 if self.starts is not None else 3
        row_bytes = item * (column.shape[-1] if column.dim() > leading else 1)
        slots = column.shape[leading - 1]
        strides = (0, 0) if self.starts is not None else (kv_heads * slots * row_bytes, slots * row_bytes)
        start = 0 if self.starts is None else self.starts.data_ptr()
        return (
            batch,
            kv_heads,
            slots,
            row_bytes,
            column.data_ptr(),
            *strides,
            row_bytes,
            start,
            *[0] * (FIELDS - SLOT),
        )

    def _index_copy(self, slot: Tensor | int, rows: Sequence[Tensor]) -> None:
        batch, kv_heads = self.heads
        if self._first_rows is None:
            if self.starts is not None:
                self._first_rows = self.starts.view(-1)
            else:
                slots = self.columns[0].shape[2]
                self._first_rows = torch.arange(0, batch * kv_heads * slots, slots, device=self.columns[0].device)
        where = (slot if isinstance(slot, int) else slot.view(-1)) + self._first_rows
        leading = 1 if self.starts is not None else 3
        for column, row in zip(self.columns, rows, strict=False):
            dim = (column.shape[-1],) if column.dim() > leading else ()
            new = row.expand(*self.heads, *row.shape[2:]).reshape(-1, *dim)
            column.view(-1, *dim).index_copy_(0, where, new)
