"""Places and rows by the compiled CPU kernels (`kernels/native/places.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.kernels.native import missing as no_extension
from kvpress.kernels.native import tensors as native


def refusal(*tensors: Tensor) -> str | None:
    """Why no native kernel can work on these tensors, or `None`."""
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
    native.built().find_places(*fields(index, place, holder, uses, tail, base, vacant, found, entries))
    return found, entries[1 : 1 + int(entries[0])]


def fields(
    index: Tensor,
    place: Tensor,
    holder: Tensor,
    uses: Tensor,
    tail: int,
    base: int,
    vacant: int,
    found: Tensor,
    entries: Tensor,
) -> tuple[int, ...]:
    """The fields of `FindPlaces`."""
    batch, lists, count = index.shape
    written = (tensor.data_ptr() for tensor in (index, place, holder, uses, found, entries))
    return (batch * lists, count, place.shape[-1], holder.shape[-1], tail, base, vacant, *written)


def rows_to_read(
    entries: Tensor, index: Tensor, places: Tensor, rows: int, block: int, blocks: int, then: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kvpress.kernels.places.rows_to_read`."""
    (batch, groups, count), missing = index.shape, len(entries)
    numbers, targets, firsts, found = torch.empty(4 * missing + 2, dtype=torch.int64).split(
        [missing, missing, missing + 1, missing + 1]
    )
    native.built().rows_to_read(
        batch * groups,
        groups,
        count,
        block,
        rows,
        missing,
        entries.data_ptr(),
        index.data_ptr(),
        places.data_ptr(),
        0 if then is None else then.data_ptr(),
        blocks,
        numbers.data_ptr(),
        targets.data_ptr(),
        firsts.data_ptr(),
        found.data_ptr(),
    )
    count = int(found[0])
    return found[1 : 1 + count], firsts[: 1 + count], numbers, targets
