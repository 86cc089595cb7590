"""Single rows of blocks of slot rows, read past every tier straight to where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from kvpress.offload.block import Block
from kvpress.offload.errors import TierError, TierLostError
from kvpress.offload.held_blocks import HeldBlocks
from kvpress.offload.key import BlockKey
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
            if source.version != mover.version:
                source.look_up(mover.blocks, mover.version)
            near = self._near(source, wanted) if source.elsewhere else {}
            self._count_rows(len(wanted.blocks), near)
            try:
                with mover.reads_rows():
                    failed = self._read_rows(near, source, wanted, out)
            finally:
                if source.opened:
                    self._keep_open(source, wanted.blocks.tolist())
                for block in near.values():
                    block.pins -= 1
                    mover.touch(block)  # nothing lies below the disk, whose order of use matters to nobody
                    mover.collect(block)
            if failed is not None:
                self._withdraw(*failed)

    def _near(self, source: RowSource, wanted: RowsWanted) -> dict[int, Block]:
        """Which of `wanted.blocks` lie in memory, pinned; it waits for those that somebody moves.

        Raises:
            TierError: one of them is lost.
        """
        mover, numbers, near = self._mover, wanted.blocks.tolist(), dict[int, Block]()
        while any(self._is_moved(source.keys[number]) for number in numbers if number in source.elsewhere):
            mover.lock.wait()
        if source.version != mover.version:
            source.look_up(mover.blocks, mover.version)
        for each, number in enumerate(numbers):
            if number not in source.elsewhere:
                continue
            block = self._settled(source.keys[number])  # which waits for nobody now
            if block is None:
                raise TierLostError("manager", "is not held", source.keys[number])
            self._check_readable(block)
            near[each] = block
        for block in near.values():
            block.pins += 1
        return near

    def _is_moved(self, key: BlockKey) -> bool:
        block = self._mover.blocks.get(key.digest)
        return block is not None and block.busy

    def _count_rows(self, blocks: int, near: Mapping[int, Block]) -> None:
        self._count(near.values())
        for tier in self._mover.tiers.values():
            tier.ledger.count(**{"hits" if tier is self._mover.disk else "misses": blocks - len(near)})

    def _withdraw(self, block: Block, error: TierError) -> None:
        while block.busy:
            self._mover.lock.wait()
        self._loader.withdraw(block, error)
        self._remove_if_lost(block)
        raise error

    def _keep_open(self, source: RowSource, numbers: Sequence[int]) -> None:
        """Files of some of these blocks were kept open, which others may have done or made useless meanwhile."""
        source.opened = 0
        for number in numbers:
            block, now = source.held[number], source.handles[number]
            if block is None or now in (-1, block.handle):
                continue
            if block.on_disk and block.handle < 0:
                block.handle = now
            else:
                self._mover.need_disk().store.let_go(now)
                source.handles[number] = block.handle

    def _read_rows(
        self, near: Mapping[int, Block], source: RowSource, wanted: RowsWanted, out: Tensor
    ) -> tuple[Block, TierError] | None:
        """The block that could not be read, and why. Called without the lock, while no copy is given up."""
        layout, on_disk = source.layout, wanted
        for each, block in near.items():
            rows = block.layout.views(next(iter(block.buffers.values())))[NAME].view(-1, layout.width)
            numbers, places = wanted.of_block(each)
            out[places] = rows[numbers.to(rows.device), : layout.payload].to(out.device)
        if len(near) == len(wanted.blocks):
            return None
        if near:
            on_disk = wanted.some([each for each in range(len(wanted.blocks)) if each not in near])
        failed = self._mover.need_disk().read_rows(source, on_disk, out, self._pool.submit)
        if failed is None:
            return None
        damaged = source.held[int(on_disk.blocks[failed[0]])]
        if damaged is None:
            raise RuntimeError("this block does not lie on disk")
        return damaged, failed[1]
