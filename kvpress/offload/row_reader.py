"""Single rows of blocks of slot rows, read past every tier straight to where they are wanted."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from kvpress.offload.block import Block
from kvpress.offload.errors import TierError, TierLostError
from kvpress.offload.held_blocks import HeldBlocks
from kvpress.offload.loader import Loader
from kvpress.offload.mover import Mover
from kvpress.offload.row_source import RowSource
from kvpress.offload.slot_rows import NAME, RowsWanted


class RowReader(HeldBlocks):
    """Blocks of which single rows can be read.

    Args:
        mover: as of `HeldBlocks`.
        threads: in the background; one of them reads along.
    """

    def __init__(self, mover: Mover, threads: int) -> None:
        super().__init__(mover)
        self._loader = Loader(mover)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvpress-offload")

    def read_rows(self, source: RowSource, wanted: RowsWanted, out: Tensor) -> None:
        """Copy the payloads of the rows `wanted` of the blocks of `source` to their places in `out [n, payload]`, a CPU tensor of uint8.

        Takes no room in any tier, and reads nothing else.

        Raises:
            TierLostError: a block is not held.
            TierCorruptError, TierLostError, TierReadError: as `get` does; `out` is then undefined.
        """
        with self._locked() as mover:
            pinned: list[Block] = []
            try:
                self._pin(source, wanted.blocks.tolist(), pinned)
                near = [number for number, block in enumerate(pinned) if block.buffers]
                self._count_rows(pinned, near)
                handles = array("i", [block.handle for block in pinned])
                known = handles[:]
                mover.moving += 1
                try:
                    with mover.unlocked(stalls=mover.disk):
                        failed = self._read_rows(pinned, near, source, wanted, handles, out)
                finally:
                    mover.moving -= 1
                    if handles != known:
                        self._keep_open(pinned, known, handles)
                if failed is not None:
                    self._withdraw(*failed)
                for number in near:  # nothing lies below the disk, whose order of use matters to nobody
                    mover.touch(pinned[number])
            finally:
                for block in pinned:
                    block.pins -= 1
                    if not block.owners:
                        mover.collect(block)
                mover.changed()

    def _pin(self, source: RowSource, numbers: Sequence[int], pinned: list[Block]) -> None:
        """Keep the copies of these blocks where they are; `pinned` gets them, one by one."""
        held = source.held
        for number in numbers:
            block = held[number]  # one without owners is gone for good, whoever knows it still
            if block is None or block.moved_by is not None or not block.owners:
                key = source.keys[number]
                block = held[number] = self._settled(key)
                if block is None:
                    raise TierLostError("manager", "is not held", key)
            if block.failure is not None or not (block.on_disk or block.buffers):
                self._missing(block)
            block.pins += 1
            pinned.append(block)

    def _count_rows(self, blocks: Sequence[Block], near: Sequence[int]) -> None:
        if near:
            self._count(blocks)
            return
        for tier in self._mover.tiers.values():  # as `_count` does where none lies in memory
            tier.ledger.count(**{"hits" if tier is self._mover.disk else "misses": len(blocks)})

    def _withdraw(self, block: Block, error: TierError) -> None:
        while block.busy:
            self._mover.lock.wait()
        self._loader.withdraw(block, error)
        self._remove_if_lost(block)
        raise error

    def _keep_open(self, blocks: Sequence[Block], known: array[int], handles: array[int]) -> None:
        """Files were kept open, which others may have done or made useless meanwhile."""
        for block, before, now in zip(blocks, known, handles, strict=True):
            if before < 0 <= now:
                if block.on_disk and block.handle < 0:
                    block.handle = now
                else:
                    self._mover.need_disk().store.let_go(now)

    def _read_rows(
        self,
        blocks: Sequence[Block],
        near: Sequence[int],
        source: RowSource,
        wanted: RowsWanted,
        handles: array[int],
        out: Tensor,
    ) -> tuple[Block, TierError] | None:
        """The block that could not be read, and why. Called without the lock, on pinned blocks, whose copies stay where they are."""
        layout, on_disk, some, of_some = source.layout, list(range(len(blocks))), wanted, handles
        for number in near:
            block = blocks[number]
            rows = block.layout.views(next(iter(block.buffers.values())))[NAME].view(-1, layout.width)
            numbers, places = wanted.of_block(number)
            out[places] = rows[numbers.to(rows.device), : layout.payload].to(out.device)
        if near:
            on_disk = sorted(set(on_disk) - set(near))
            if not on_disk:
                return None
            some, of_some = wanted.some(on_disk), array("i", [handles[each] for each in on_disk])
        failed = self._mover.need_disk().read_rows(source, some, of_some, out, self._pool.submit)
        if near:
            for each, handle in zip(on_disk, of_some, strict=True):
                handles[each] = handle
        return None if failed is None else (blocks[on_disk[failed[0]]], failed[1])
