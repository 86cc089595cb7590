"""Device -> host -> disk: blocks of a cache under byte limits.

A block is an immutable set of named tensors. What a `get` returns is exactly what was put, or None for a block the
manager does not hold, or a typed error that says what was lost; never anything else.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import NoReturn

from torch import Tensor

from kvpress.offload.block import Block
from kvpress.offload.disk import DiskTier
from kvpress.offload.errors import TierClosedError, TierCorruptError, TierError, TierFullError, TierLostError
from kvpress.offload.host import MemoryTier
from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout
from kvpress.offload.ledger import TierStatistics
from kvpress.offload.mover import Attempt, Mover, Tier
from kvpress.offload.options import Offload
from kvpress.offload.row_reader import RowReader
from kvpress.offload.store import FileStore
from kvpress.offload.transfer import Device, HostDevice, Transfer

logger = logging.getLogger(__name__)
THREADS = 2  # reads and writes in the background; more only compete for one disk


class TierManager(RowReader):
    """Holds blocks in the tiers that `options` names. Safe to use from several threads.

    Args:
        options: the tiers and their limits.
        device: the device that computes; host memory when None.
        transfer: makes the copies between device and host; made from `device` when None.
        open_store: makes the file store for the disk tier's folder.
    """

    def __init__(
        self,
        options: Offload,
        device: Device | None = None,
        transfer: Transfer | None = None,
        open_store: Callable[[Path], FileStore] = FileStore,
    ) -> None:
        device = HostDevice() if device is None else device
        tiers: list[Tier] = []
        if options.device_bytes is not None:
            tiers.append(MemoryTier("device", options.device_bytes, device.device_bytes))
        if options.host_bytes is not None:
            tiers.append(MemoryTier("host", options.host_bytes, device.host_bytes))
        if options.disk is not None:
            tiers.append(DiskTier(options.disk, options.disk_bytes, open_store))
        super().__init__(Mover(device, Transfer(device) if transfer is None else transfer, tiers), THREADS)
        self._background: set[Future[None]] = set()

    # --- storing -----------------------------------------------------------------------------------------------

    def put(self, key: BlockKey, tensors: Mapping[str, Tensor], owner: str) -> None:
        """Store a copy of `tensors` in the nearest tier with room.

        Raises:
            ValueError: the key is in use. A rewritten block needs a new generation.
            TierFullError: no tier has room. Nothing of the block is stored, and no other block was lost.
        """
        layout = BlockLayout.of(tensors)
        with self._locked() as mover:
            while (old := mover.blocks.get(key.digest)) is not None and not old.owners and not old.pins:
                mover.lock.wait()  # it is being removed
            if old is not None:
                raise ValueError(f"key must be new (a rewritten block needs a new generation), got {key}")
            block = Block(key, layout, {owner})
            mover.blocks[key.digest] = block
            with mover.move(block):
                mover.moving -= 1  # it waits for others, so nobody may wait for it
                try:
                    mover.until_room(lambda attempt: self._place(block, tensors, attempt), "store", key)
                except BaseException:
                    block.owners.clear()
                    raise
                finally:
                    mover.moving += 1

    def _place(self, block: Block, tensors: Mapping[str, Tensor], attempt: Attempt) -> bool:
        mover = self._mover
        for tier in mover.tiers.values():
            size = tier.size(block.key, block.layout)
            if not mover.reserve(tier.name, size, attempt):
                attempt.causes.append(TierFullError(tier.name, f"has no room for {size} bytes", block.key))
                continue
            try:
                with mover.unlocked(stalls=tier):
                    buffer = self._fill(tier, block, tensors)
            except TierError as error:
                attempt.causes.append(error)
                if isinstance(tier, MemoryTier):
                    tier.ledger.release(size)
                continue
            mover.publish(block, tier.name, buffer)
            return True
        return False

    def _fill(self, tier: Tier, block: Block, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if isinstance(tier, DiskTier):
            tier.write(block.key, block.layout, tensors)
            return None
        buffer = self._mover.new_buffer(tier.name, block.layout.nbytes)
        if tier.name == "device":
            self._mover.device.launch(lambda: block.layout.copy_into(buffer, tensors))
        else:
            block.layout.copy_into(buffer, tensors)
        return buffer

    # --- reading -----------------------------------------------------------------------------------------------

    def get(self, key: BlockKey, pin: bool = False) -> dict[str, Tensor] | None:
        """The block's tensors where the computation can read them, or None for a block that is not held.

        The tensors must not be written to. Their memory counts in its tier only while the block is there: pin it
        while they are in use (see `use`).

        Raises:
            TierCorruptError, TierLostError: its only copy is gone; from now on it is a miss.
            TierReadError: reading failed twice; it is kept and may be asked for again.
            TierFullError: no memory tier has room for it; it stays where it is.
        """
        with self._locked() as mover:
            block = self._settled(key)
            if block is None:
                return None
            self._count([block])
            if self._loader.usable_tier(block) != next(iter(mover.tiers)):
                mover.until_room(lambda attempt: self._load(block, attempt), "load", key)
            name = self._loader.usable_tier(block)
            if name is None:
                return None  # its owner dropped it meanwhile
            mover.touch(block)
            buffer = block.buffers[name]
            if name == "device":
                mover.transfer.join(buffer)
            block.pins += int(pin)
            return block.layout.views(buffer)

    def _load(self, block: Block, attempt: Attempt) -> bool:
        mover = self._mover
        while block.busy:
            mover.lock.wait()
        if mover.blocks.get(block.key.digest) is not block or not block.owners:
            return True
        self._check_readable(block)
        with mover.move(block):
            try:
                return self._loader.load(block, attempt) is not None
            except TierError:
                self._remove_if_lost(block)
                raise

    def is_near(self, key: BlockKey) -> bool:
        """Whether the computation can read a copy of the block where it lies."""
        with self._locked():
            block = self._settled(key)
            return block is not None and self._loader.usable_tier(block) is not None

    def read_into(self, key: BlockKey, out: Mapping[str, Tensor]) -> bool:
        """Copy the block into the caller's tensors, straight from the tier it lies in; False for a miss.

        Takes no room in any tier. Contiguous CPU tensors are read into from disk without another copy.

        Raises TierCorruptError, TierLostError, TierReadError as `get` does; `out` is then undefined. Raises
        ValueError when `out` has other names, dtypes or shapes than the block.
        """
        with self._locked() as mover:
            block = self._settled(key)
            if block is None:
                return False
            block.layout.check(out)
            self._count([block])
            self._check_readable(block)
            source = mover.tiers[block.tiers[0]]
            buffer = block.buffers.get(source.name)
            with self._reading(block):
                try:
                    with mover.unlocked(stalls=source):
                        self._loader.read_into(block, source.name, buffer, out)
                except TierError as error:
                    while block.busy:
                        mover.lock.wait()
                    self._loader.withdraw(block, error)
                    self._remove_if_lost(block)
                    raise
                mover.touch(block)
            if isinstance(source, MemoryTier):
                source.ledger.count(bytes_out=block.layout.nbytes)
            return True

    def prefetch(self, keys: Iterable[BlockKey]) -> None:
        """Bring blocks near in the background, in the order given. A failure is raised by the next `get`."""
        self._in_background(keys, self._prefetch_one)

    def spill(self, keys: Iterable[BlockKey]) -> None:
        """Copy blocks one tier down in the background, so that giving up the near copy later costs nothing."""
        self._in_background(keys, self._spill_one)

    def wait(self) -> None:
        """Return when all background work asked for so far is done."""
        for future in list(self._background):
            with suppress(CancelledError):
                future.result()

    # --- memory of the caller's own ----------------------------------------------------------------------------

    @property
    def near(self) -> MemoryTier | None:
        """The tier that accounts for memory the computation works in: the nearest one, if it is such memory."""
        nearest = next(iter(self._mover.tiers.values()))
        is_near = nearest.name == "device" or self._mover.device.is_host
        return nearest if isinstance(nearest, MemoryTier) and is_near else None

    def hold(self, nbytes: int) -> bool:
        """Reserve bytes of the near tier for tensors of the caller's own, moving blocks down; False when they cannot be had.

        Without a near tier nothing is reserved, and the answer is True.
        """
        tier = self.near
        if tier is None:
            return True
        with self._locked() as mover:
            while True:
                attempt, before = Attempt(), mover.changes
                if mover.reserve(tier.name, nbytes, attempt):
                    return True
                if mover.moving:
                    mover.lock.wait()
                elif mover.changes == before and not attempt.met_busy:
                    return False

    def release(self, nbytes: int) -> None:
        """Give bytes back that `hold` reserved."""
        tier = self.near
        if tier is not None:
            tier.ledger.release(nbytes)
            with self._mover.lock:
                self._mover.changed()

    def background(self, work: Callable[[], None]) -> Future[None]:
        """Run `work` on a thread of the pool. `close` waits for it, or cancels it before it began."""
        with self._locked():
            return self._pool.submit(work)

    def is_own_thread(self, thread: Thread) -> bool:
        """Whether `thread` belongs to the pool."""
        return thread in self._pool._threads

    # --- moving and using -------------------------------------------------------------------------------------

    @contextmanager
    def use(self, keys: Iterable[BlockKey]) -> Iterator[list[dict[str, Tensor]]]:
        """Get several blocks and keep them pinned meanwhile. A block that is not held is a TierLostError."""
        pinned: list[BlockKey] = []
        found = []
        try:
            for key in keys:
                tensors = self.get(key, pin=True)
                if tensors is None:
                    raise TierLostError("manager", "is not held", key)
                pinned.append(key)
                found.append(tensors)
            yield found
        finally:
            for key in pinned:
                self.unpin(key)

    def evict(self, key: BlockKey) -> bool:
        """Move the block's nearest copy one tier down now. False when it is not held, in use, or nothing takes it."""
        with self._locked() as mover:
            block = self._settled(key)
            if block is None or block.pins or not block.buffers:
                return False
            return mover.demote(block, block.tiers[0], Attempt())

    # --- facts -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, TierStatistics]:
        """Counters of each tier, the nearest first."""
        return {name: tier.ledger.statistics() for name, tier in self._mover.tiers.items()}

    def bytes_in_memory(self, owner: str) -> int:
        """Bytes of the copies in memory of the blocks that `owner` relies on."""
        with self._mover.lock:
            mine = [block for block in self._mover.blocks.values() if owner in block.owners]
            return sum(block.layout.nbytes for block in mine for _ in block.buffers)

    @property
    def computes_in_host_memory(self) -> bool:
        """Whether the device that computes reads host memory."""
        return self._mover.device.is_host

    def close(self) -> None:
        """Stop the threads, free every block and remove the files. Closing twice is no error."""
        if os.getpid() != self._process:
            return
        with self._mover.lock:
            if self._closed:
                return
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._mover.lock:
            for block in list(self._mover.blocks.values()):
                for name in list(block.buffers):
                    self._mover.forget(block, name)
            self._mover.blocks.clear()
        if self._mover.disk is not None:
            self._mover.disk.close()

    def __enter__(self) -> "TierManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("a TierManager cannot be copied; share() lets a second cache rely on the same blocks")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TierManager cannot be pickled: it holds open files and threads")

    # --- inside ------------------------------------------------------------------------------------------------

    def _in_background(self, keys: Iterable[BlockKey], work: Callable[[BlockKey], None]) -> None:
        with self._locked():
            futures = [self._pool.submit(work, key) for key in keys]
            self._background.update(futures)
        for future in futures:
            future.add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        self._background.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.error("work of the offload threads failed", exc_info=error)

    def _prefetch_one(self, key: BlockKey) -> None:
        with suppress(TierClosedError), self._locked() as mover:
            block = mover.blocks.get(key.digest)
            if block is None or block.busy or not block.owners or block.failure is not None or not block.tiers:
                return
            if block.tiers[0] == next(iter(mover.tiers)):
                mover.touch(block)
                return
            try:
                with mover.move(block):
                    self._loader.load(block, Attempt())
                mover.touch(block)
            except (TierCorruptError, TierLostError) as error:
                block.failure = error
            except TierError:
                pass  # a passing error; the next get tries again

    def _spill_one(self, key: BlockKey) -> None:
        with suppress(TierClosedError), self._locked() as mover:
            block = mover.blocks.get(key.digest)
            if block is None or block.busy or not block.owners or len(block.tiers) != 1 or not block.buffers:
                return
            with mover.move(block):
                mover.copy_down(block, block.tiers[0], Attempt())
