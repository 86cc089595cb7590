"""Buffers: how they are made, and what they really hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def allocate(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised buffer on the device of `like`, writable in place with and without inference mode."""
    with torch.inference_mode(False):
        return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def filled(shape: Sequence[int], value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer like that of `allocate`, full of `value`."""
    with torch.inference_mode(False):
        return torch.full(tuple(shape), value, dtype=dtype, device=like.device)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())
