"""Buffers: how they are made, and what they really hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from kvpress.host_memory import empty_pages
from kvpress.kernels.native.tensors import prefer_large_pages

LARGE = 2 << 20  # bytes of a large page: a buffer of so many begins at a multiple of it and asks for them
GROWTH = 64  # what grows gets one part in so many of spare room, so that it never holds much more than it keeps
FEW = 512  # a table of fewer slots gets half as many again, up to
STEP = 32  # spare ones: new buffers at every few tokens would cost more than attention does


def allocate(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised buffer on the device of `like`, writable in place with and without inference mode."""
    with torch.inference_mode(False):
        return _empty(shape, like, dtype or like.dtype)


def filled(shape: Sequence[int], value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer like that of `allocate`, full of `value`."""
    with torch.inference_mode(False):
        return _empty(shape, like, dtype).fill_(value)


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    if not like.is_cpu:
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)
    nbytes = prod(shape) * dtype.itemsize
    buffer = empty_pages(nbytes, aligned=LARGE if nbytes >= LARGE else 1)
    if nbytes >= LARGE:
        prefer_large_pages(buffer)
    return buffer.view(dtype).view(tuple(shape))


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    return sum(storages(tensors).values())


def storages(tensors: Iterable[Tensor | None]) -> dict[tuple[int, torch.device], int]:
    """The storages behind `tensors`, by where they are, and their bytes."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage.data_ptr(), tensor.device] = storage.nbytes()
    return found


def growth(count: int) -> int:
    """Spare slots for what grows and has `count` of them, where every byte is asked for."""
    return max(4, count // GROWTH)


def table_growth(count: int) -> int:
    """As `growth`, for the buffers of a table that no limit of bytes holds down."""
    return max(4, min(count // 2, STEP)) if count < FEW else growth(count)


def take(source: Tensor, index: Tensor, capacity: int, pack: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor:
    """Slots `index [batch, kv_heads, n]` of `source [batch, kv_heads, slots, dim]`, packed, in a new buffer of `capacity` slots."""
    batch, kv_heads, kept = index.shape
    row = torch.arange(batch, device=source.device)[:, None, None]
    head = torch.arange(kv_heads, device=source.device)[None, :, None]
    rows = pack(source[row, head, index])
    buffer = allocate((batch, kv_heads, capacity, rows.shape[-1]), rows)
    buffer[:, :, :kept] = rows
    buffer[:, :, kept:] = 0  # a slot never written must not bring NaN into a product with weight 0
    return buffer


def grown(source: Tensor, count: int, capacity: int) -> Tensor:
    """The first `count` slots of `source` in a buffer of `capacity` slots, the others 0."""
    buffer = allocate((*source.shape[:2], capacity, *source.shape[3:]), source)
    buffer[:, :, :count] = source[:, :, :count]
    buffer[:, :, count:] = 0
    return buffer
