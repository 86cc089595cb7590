"""How the keys and values of a slot are stored: as the model made them, in a narrower type, or int8 with a scale a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.packing import SCALE_BYTES, pack_int8

_LARGEST_HALF = torch.finfo(torch.float16).max
KV_DTYPES = ("bfloat16", "float16", "int8")


class RowFormat:
    """Rows as the model made them; subclasses store them in fewer bytes.

    A stored tensor has the shape of the rows but for the last dimension, so that slots can be moved, evicted, spilled and saved without
    knowing how a row is written.
    """

    name: str | None = None

    @property
    def plain(self) -> bool:
        """Whether rows are stored as they come."""
        return type(self) is RowFormat

    def pack(self, rows: Tensor) -> Tensor:
        """`rows [..., dim]` as they are stored."""
        return rows

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored rows as `[..., dim]` of `dtype`."""
        return stored

    def parts(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the kernels read, without a copy: rows `[..., dim]`, and a scale `[...]` for int8 ones."""
        return stored, None

    def readable(
        self, keys: Tensor, values: Tensor, layout: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Stored keys and values as the kernels read them, and `layout` with the scales of int8 ones."""
        (keys, keys_scale), (values, values_scale) = self.parts(keys), self.parts(values)
        if keys_scale is not None and values_scale is not None:
            layout = layout | {"keys_scale": keys_scale, "values_scale": values_scale}
        return keys, values, layout

    def stored_as(self, dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Size and type of the last dimension of stored rows that came as `dim` numbers of `dtype`."""
        return dim, dtype

    def row_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one stored row of `dim` numbers that came as `dtype`."""
        size, stored = self.stored_as(dim, dtype)
        return size * stored.itemsize


class NarrowRows(RowFormat):
    """Rows in a floating-point type of 16 bits; what is beyond the range of fp16 becomes its largest number."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.name = dtype, str(dtype).removeprefix("torch.")

    def pack(self, rows: Tensor) -> Tensor:
        if rows.dtype != self.dtype:
            if self.dtype == torch.float16:
                rows = rows.clamp(-_LARGEST_HALF, _LARGEST_HALF)
            rows = rows.to(self.dtype)
        return rows

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)

    def stored_as(self, dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        return dim, self.dtype


class Int8Rows(RowFormat):
    """Rows of int8, each followed by the four bytes of its fp32 scale: the row's largest magnitude is 127 of it."""

    name = "int8"

    def pack(self, rows: Tensor) -> Tensor:
        return pack_int8(rows)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        rows, scale = self.parts(stored)
        return (rows.float() * scale[..., None]).to(dtype)

    def parts(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        dim = stored.shape[-1] - SCALE_BYTES
        return stored[..., :dim], stored[..., dim:].view(torch.float32).squeeze(-1)

    def stored_as(self, dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        return dim + SCALE_BYTES, torch.int8


def row_format(kv_dtype: str | None) -> RowFormat:
    """The format of a name of `KV_DTYPES`, or `None`.

    Raises:
        ValueError: another name.
    """
    if kv_dtype is None:
        return RowFormat()
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be None or one of {list(KV_DTYPES)}, got {kv_dtype!r}")
    return Int8Rows() if kv_dtype == "int8" else NarrowRows(getattr(torch, kv_dtype))


class PackedRows:
    """Stands for keys or values `[batch, kv_heads, slots, dim]` that lie in a row format: unpacks what is asked of it."""

    def __init__(self, stored: Tensor, form: RowFormat, dtype: torch.dtype) -> None:
        self.stored, self.form, self.dtype = stored, form, dtype
        self.rows, self.scale = form.parts(stored)

    @property
    def shape(self) -> torch.Size:
        """As of the rows."""
        return self.rows.shape

    @property
    def device(self) -> torch.device:
        """As of the rows."""
        return self.stored.device

    def part(self, *item: Any) -> PackedRows:
        """Some batch rows, heads and slots, still stored."""
        return PackedRows(self.stored[item], self.form, self.dtype)

    def __getitem__(self, item: Any) -> Tensor:
        return self.form.unpack(self.stored[item], self.dtype)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """As of a tensor, unpacked."""
        return self.form.unpack(self.stored.index_select(dim, index), self.dtype)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """As of a tensor, unpacked; `index` is the same for all numbers of a row."""
        whole = index[..., :1].expand(*index.shape[:-1], self.stored.shape[-1])
        return self.form.unpack(self.stored.gather(dim, whole), self.dtype)


Rows = Tensor | PackedRows


def part(rows: Rows, *item: Any) -> Rows:
    """Some batch rows, heads and slots, in the form in which they lie."""
    return rows[item] if isinstance(rows, Tensor) else rows.part(*item)


def unpacked(rows: Rows) -> Tensor:
    """Rows as a tensor of the model's type."""
    return rows[:, :, :] if isinstance(rows, PackedRows) else rows


def parts(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Rows as the kernels read them, and the scale of int8 ones."""
    return (rows.rows, rows.scale) if isinstance(rows, PackedRows) else (rows, None)
