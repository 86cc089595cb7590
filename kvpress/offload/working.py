"""Working memory: where the keys and values of one layer are put together for its attention."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from kvpress.memory import allocate
from kvpress.offload.errors import TierFullError, TierLostError
from kvpress.offload.key import BlockKey
from kvpress.offload.manager import TierManager
from kvpress.offload.slot_rows import NAME, RowLayout

ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class StoredBlock:
    """A block of consecutive slots in the tiers.

    Attributes:
        parts: names of the tensors `[batch, kv_heads, slots, dim]` that were written together, and the key of each part.
        batch: batch rows it was written with.
        rows: which of them the batch rows of now are; None for all, in order.
        layout: of its slot rows, where it was written as such (one part, of which any tensor can be read alone).
    """

    parts: tuple[tuple[tuple[str, ...], BlockKey], ...]
    batch: int
    rows: tuple[int, ...] | None = None
    layout: RowLayout | None = None

    @property
    def keys(self) -> list[BlockKey]:
        """Of all parts."""
        return [key for _, key in self.parts]

    def selected(self, rows: Sequence[int]) -> StoredBlock:
        """As it looks when row `i` becomes what row `rows[i]` was."""
        old = range(self.batch) if self.rows is None else self.rows
        new = tuple(old[row] for row in rows)
        return replace(self, rows=None if new == tuple(range(self.batch)) else new)

    def readings(self, out: dict[str, Tensor]) -> list[Reading]:
        """What to read to fill the tensors of `out`, by name."""
        if self.layout is not None:
            return [Reading(self.parts[0][1], self, out)]
        wanted = [(names, key) for names, key in self.parts if names[0] in out]
        return [Reading(key, self, {name: out[name] for name in names}) for names, key in wanted]


@dataclass(frozen=True)
class Reading:
    """One part of a block to read, and the tensors `[batch, kv_heads, slots, dim]` it goes to, by name."""

    key: BlockKey
    block: StoredBlock
    out: dict[str, Tensor]

    def run(self, manager: TierManager, staging: Tensor) -> None:
        """Read it.

        Args:
            staging: a flat buffer for one block, which a file that cannot be read in place goes through.

        Raises:
            TierError: it is lost, or cannot be read now; the tensors are then undefined.
        """
        in_place = (
            self.block.rows is None
            and self.block.layout is None
            and (
                manager.tiers_of(self.key)[:1] != ["disk"]
                or all(o.is_contiguous() and o.is_cpu for o in self.out.values())
            )
        )
        if in_place:
            try:
                found = manager.read_into(self.key, self.out)
            except TierFullError:  # it went to disk this moment, and there is no room on the way to strided memory
                found = self._run_staged(manager, staging)
        else:
            found = self._run_staged(manager, staging)
        if not found:
            raise TierLostError("manager", "is not held", self.key)

    def _run_staged(self, manager: TierManager, staging: Tensor) -> bool:
        """A file is read into contiguous memory, small enough to stay in the processor's cache, and copied from there."""
        rows = self.block.rows
        staged = self.staged(manager, staging)
        for name, out in self.out.items():
            out.copy_(staged[name] if rows is None else staged[name][list(rows)])
        return True

    def staged(self, manager: TierManager, staging: Tensor) -> dict[str, Tensor]:
        """The part as it was written, in `staging`; only the shapes and types of `out` matter, its batch rows aside.

        Raises:
            TierError: as `run`.
        """
        if (layout := self.block.layout) is not None:
            slot_rows = shaped(staging, [layout.shape(self.block.batch)], [torch.uint8])[0]
            if not manager.read_into(self.key, {NAME: slot_rows}):
                raise TierLostError("manager", "is not held", self.key)
            return layout.unpack(slot_rows)
        shapes = [(self.block.batch, *out.shape[1:]) for out in self.out.values()]
        tensors = shaped(staging, shapes, [out.dtype for out in self.out.values()])
        found = dict(zip(self.out, tensors, strict=True))
        if not manager.read_into(self.key, found):
            raise TierLostError("manager", "is not held", self.key)
        return found


def shaped(buffer: Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Tensors of these shapes and types in a flat buffer, one behind the other."""
    tensors, start = [], 0
    with torch.inference_mode(False):  # a view of another type that is made in that mode can be written to nowhere else
        for shape, dtype in zip(shapes, dtypes, strict=True):
            stop = start + prod(shape) * dtype.itemsize
            tensors.append(buffer[start:stop].view(dtype).view(tuple(shape)))
            start = -(-stop // ALIGNMENT) * ALIGNMENT
    return tensors


def shaped_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """Bytes that `shaped` needs."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def read_all(manager: TierManager, readings: Sequence[Reading], staging: Tensor) -> None:
    """Read blocks one after the other, through `staging` where they cannot be read in place.

    Raises:
        TierError: one of them is lost, or cannot be read now.
    """
    with torch.inference_mode(False), torch.no_grad():
        for reading in readings:
            reading.run(manager, staging)


class WorkingMemory:
    """One flat buffer that holds the keys and values of one layer at a time, and another for one block on its way from a file.

    Attributes:
        layer: whose they are, -1 for nobody.
        future: the reading under way, or done ahead of time.
    """

    def __init__(self, nbytes: int, staging: int, like: Tensor) -> None:
        self.buffer = allocate((nbytes,), like, torch.uint8)
        self.staging = allocate((staging,), torch.empty(0), torch.uint8)
        self.layer = -1
        self.future: Future[None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.buffer.nbytes + self.staging.nbytes

    def forget(self) -> None:
        """Nobody's from now on; returns when nothing is read into it any more."""
        if self.future is not None and not self.future.cancel():
            self.future.exception()
        self.layer, self.future = -1, None
