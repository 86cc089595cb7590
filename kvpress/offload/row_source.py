"""Blocks of slot rows of which single rows are read again and again: what reading them needs to know of each is found once."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from kvpress.offload.format import header_bytes
from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout
from kvpress.offload.slot_rows import NAME, RowLayout, seed_of
from kvpress.offload.store import NAME_BYTES, checked

if TYPE_CHECKING:
    from kvpress.offload.block import Block
    from kvpress.offload.working import StoredBlock


class RowSource:
    """Blocks of rows of one layout, in order.

    Attributes:
        keys: of the blocks.
        held: what the manager knew of each, None for one that does not lie on disk alone.
        handles: of their files, where they are kept open, else -1.
        opened: how many of them were kept open since the manager looked.
        elsewhere: numbers of those that do not lie on disk alone, or that somebody moves.
        version: of the manager's blocks, of which this is true; -1 for none.
        names: `[blocks, NAME_BYTES]` uint8, of their files, each ended by 0.
        sizes, starts: `[blocks]` int64, bytes of each file, and before its rows.
        seeds: `[blocks]` uint64, of the checksums of its rows.
        addresses: of these four.
        batch_rows: `[blocks, batch]` int64, which batch row of a block each batch row of now is; None where all are what they were.
    """

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout
        self.keys: list[BlockKey] = []
        self.held: list[Block | None] = []
        self.handles = array("i")
        self.elsewhere: set[int] = set()
        self.version = -1
        self.opened = 0
        self.names = numpy.empty((0, NAME_BYTES), dtype=numpy.uint8)
        self.sizes = self.starts = numpy.empty(0, dtype=numpy.int64)
        self.seeds = numpy.empty(0, dtype=numpy.uint64)
        self.addresses: tuple[int, ...] = ()
        self.batch_rows: Tensor | None = None
        self._followed: Sequence[StoredBlock] = ()

    def follow(self, blocks: Sequence[StoredBlock]) -> None:
        """The blocks are these now; a list of them that changes only grows. Only new ones cost time."""
        if blocks is self._followed and len(blocks) == len(self.keys):
            return
        keys = [block.parts[0][1] for block in blocks]
        known = 0
        while known < min(len(keys), len(self.keys)) and keys[known] is self.keys[known]:
            known += 1
        self.keys, self._followed, self.version = keys, blocks, -1
        new = [self._facts(block) for block in blocks[known:]]
        names = numpy.frombuffer(b"".join(name for name, *_ in new), dtype=numpy.uint8).reshape(-1, NAME_BYTES)
        sizes, starts = (numpy.array([facts[which] for facts in new], dtype=numpy.int64) for which in (1, 2))
        seeds = numpy.array([seed for *_, seed in new], dtype=numpy.uint64)
        self.names = numpy.concatenate([self.names[:known], names])
        self.sizes = numpy.concatenate([self.sizes[:known], sizes])
        self.starts = numpy.concatenate([self.starts[:known], starts])
        self.seeds = numpy.concatenate([self.seeds[:known], seeds])
        arrays = self.names, self.sizes, self.starts, self.seeds
        self.addresses = tuple(array.ctypes.data for array in arrays)
        self.batch_rows = None
        if any(block.rows is not None for block in blocks):
            self.batch_rows = torch.tensor([block.rows or range(block.batch) for block in blocks])

    def look_up(self, blocks: Mapping[str, Block], version: int) -> None:
        """Where the blocks are now, among all that the manager knows."""
        self.held, self.version = [], version
        for key in self.keys:
            block = blocks.get(key.digest)
            whole = block is not None and block.owners and not block.busy and block.failure is None
            self.held.append(block if whole and block is not None and block.on_disk and not block.buffers else None)
        self.elsewhere = {number for number, block in enumerate(self.held) if block is None}
        self.handles = array("i", [-1 if block is None else block.handle for block in self.held])

    def _facts(self, block: StoredBlock) -> tuple[bytes, int, int, int]:
        """Its file's name, its size, the bytes before its rows, and the seed of their checksums."""
        key, shape = block.parts[0][1], self.layout.shape(block.batch)
        layout = BlockLayout.from_specifications({NAME: (torch.uint8, shape)})
        start = header_bytes(key.description(), layout)
        return checked(key.digest).encode() + b"\0", start + layout.nbytes, start, seed_of(key)
