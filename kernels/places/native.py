"""Finding places by the compiled CPU kernels (`kernels/native/places.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import missing as no_extension
from kvpress.kernels.native import tensors as native


def refusal(*tensors: Tensor) -> str | None:
    """Why no native kernel can find places in these tensors, or `None`."""
    if no_extension is not None or torch.compiler.is_compiling():
        return no_extension or "torch.compile cannot trace through these kernels"
    fits = all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
    return None if fits else "native kernels need contiguous host memory"


def find_places(
    index: Tensor, place: Tensor, holder: Tensor, uses: Tensor, tail: int, base: int, vacant: int
) -> tuple[Tensor, Tensor]:
    """See `kvpress.kernels.places.find_places`."""
    batch, lists, count = index.shape
    found = torch.empty(batch, lists, count, dtype=torch.int64)
    entries = torch.empty(batch * lists * count + 1, dtype=torch.int64)  # how many are missing, then which
    native.built().find_places(
        batch * lists,
        count,
        place.shape[-1],
        holder.shape[-1],
        tail,
        base,
        vacant,
        index.data_ptr(),
        place.data_ptr(),
        holder.data_ptr(),
        uses.data_ptr(),
        found.data_ptr(),
        entries.data_ptr(),
    )
    return found, entries[1 : 1 + int(entries[0])]
