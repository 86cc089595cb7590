"""Moving blocks between tiers under one lock, which is let go while bytes are copied, read or written.

What keeps this free of deadlock: a thread that moves a block (`busy`) never waits for another one. When it finds
no room it gives up, and its caller, who holds nothing, waits for a change and tries again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Lock, get_ident

from torch import Tensor

from kvpress.offload.block import Block
from kvpress.offload.disk import DiskTier
from kvpress.offload.errors import TierError, TierFullError
from kvpress.offload.host import MemoryTier
from kvpress.offload.key import BlockKey
from kvpress.offload.order import UseOrder
from kvpress.offload.transfer import Device, Transfer

Tier = MemoryTier | DiskTier


@dataclass
class Attempt:
    """Why one attempt to make room failed, and whether another thread's move stood in its way."""

    causes: list[TierError] = field(default_factory=list)
    met_busy: bool = False


class Mover:
    """Copies of blocks in the tiers, from the nearest to the farthest. Methods expect `lock` to be held.

    Attributes:
        changes: raised whenever room became available.
        moving: moves under way; they end without waiting for anything but their own bytes.
        version: raised whenever a block comes, goes, lies elsewhere, or is moved by somebody.
        reading: who reads rows of blocks on disk; while above 0 no copy there is given up.
    """

    def __init__(self, device: Device, transfer: Transfer, tiers: list[Tier]) -> None:
        self.device, self.transfer = device, transfer
        self.tiers = {tier.name: tier for tier in tiers}
        self.orders = {tier.name: UseOrder() for tier in tiers}
        self.blocks: dict[str, Block] = {}
        self.lock = Condition(Lock())
        self.changes = self.version = 0
        self.moving = self.reading = 0
        self._abandoned: list[Block] = []  # while rows were read

    @property
    def memory_tiers(self) -> list[MemoryTier]:
        return [tier for tier in self.tiers.values() if isinstance(tier, MemoryTier)]

    @property
    def disk(self) -> DiskTier | None:
        tier = self.tiers.get("disk")
        return tier if isinstance(tier, DiskTier) else None

    def changed(self) -> None:
        """Room became available: wake everybody who waits."""
        self.changes += 1
        self.lock.notify_all()

    @contextmanager
    def unlocked(self, stalls: Tier | None = None) -> Iterator[None]:
        """Let the lock go meanwhile, and book the time to the tier that makes the caller wait."""
        self.lock.release()
        start = time.perf_counter()
        try:
            yield
        finally:
            if stalls is not None:
                stalls.ledger.count(stall_seconds=time.perf_counter() - start)
            self.lock.acquire()

    @contextmanager
    def move(self, block: Block) -> Iterator[None]:
        """Mark `block` busy. If nobody owns it any more at the end, it goes."""
        block.moved_by = get_ident()
        self.moving += 1
        self.version += 1
        try:
            yield
        finally:
            self.version += 1
            block.moved_by = None
            self.moving -= 1
            self.collect(block)
            self.lock.notify_all()

    def collect(self, block: Block) -> None:
        """Free a block that nobody owns and nobody uses."""
        if block.owners:
            return
        self.version += 1
        if not block.pins and not block.busy and self.blocks.get(block.key.digest) is block:
            if self.reading:
                self._abandoned.append(block)
                return
            del self.blocks[block.key.digest]
            for tier in block.tiers:
                self.forget(block, tier)

    @contextmanager
    def reads_rows(self) -> Iterator[None]:
        """Let the lock go while rows of blocks on disk are read."""
        self.reading += 1
        self.moving += 1
        try:
            with self.unlocked(stalls=self.disk):
                yield
        finally:
            self.reading -= 1
            self.moving -= 1
            if not self.reading:
                abandoned, self._abandoned = self._abandoned, []
                for block in abandoned:
                    self.collect(block)
                self.changed()

    def touch(self, block: Block) -> None:
        """Make the block the most recently used of every tier that holds it."""
        for tier in block.tiers:
            self.orders[tier].touch(block.key.digest)

    def publish(self, block: Block, name: str, buffer: Tensor | None) -> None:
        """A complete copy now lies in the tier."""
        self.version += 1
        if buffer is None:
            block.on_disk = True
        else:
            block.buffers[name] = buffer
            self.tiers[name].ledger.count(blocks=1, bytes_in=block.layout.nbytes)
        self.orders[name].touch(block.key.digest)

    def forget(self, block: Block, name: str, keep_buffer: bool = False) -> None:
        """Give up the copy in the tier, and its bytes."""
        self.version += 1
        self.orders[name].remove(block.key.digest)
        if name == "disk":
            disk, handle = self.need_disk(), block.handle
            block.on_disk, block.handle = False, -1
            disk.store.let_go(handle)  # its bytes are free once no handle is left
            disk.remove(block.key, block.layout)
        else:
            tier, buffer = self.tiers[name], block.buffers.pop(name)
            if not keep_buffer:
                self.release_buffer(name, buffer)
            tier.ledger.release(tier.size(block.key, block.layout))
            tier.ledger.count(blocks=-1)
        self.changed()

    def new_buffer(self, name: str, nbytes: int) -> Tensor:
        """A buffer in a memory tier, whose bytes are reserved. Raises TierFullError when the allocator has none."""
        try:
            return self.device.empty(nbytes) if name == "device" else self.device.empty_host(nbytes)
        except (MemoryError, RuntimeError, OSError) as error:
            raise TierFullError(name, f"the allocator has no {nbytes} bytes ({error})") from error

    def release_buffer(self, name: str, buffer: Tensor) -> None:
        """Give a buffer back."""
        if name == "device":
            self.transfer.free(buffer)
        else:
            self.transfer.free_host(buffer)

    def reserve(self, name: str, nbytes: int, attempt: Attempt) -> bool:
        """Reserve bytes in a tier, moving the least recently used blocks down. May let the lock go meanwhile."""
        tier = self.tiers[name]
        limit = tier.ledger.limit
        only_free = False
        while limit is None or nbytes <= limit:
            if tier.ledger.reserve(nbytes):
                return True
            victim = self._victim(name, only_free, attempt)
            if victim is None:
                if isinstance(tier, DiskTier) and tier.sweep():
                    continue
                return False
            if victim.tiers[0] != name or only_free:
                self.forget(victim, name)
            elif not self.demote(victim, name, attempt):
                only_free = True  # what lies below is full or failing; copies that exist twice can still go
        return False

    def until_room(self, attempt: Callable[[Attempt], bool], verb: str, key: BlockKey) -> None:
        """Repeat `attempt` until it works. TierFullError when it fails and nobody else's move could help."""
        while True:
            now = Attempt()
            before = self.changes
            if attempt(now):
                return
            if self.moving:
                self.lock.wait()
            elif self.changes == before and not now.met_busy:
                reasons = "; ".join(dict.fromkeys(f"{cause.tier} {cause.reason}" for cause in now.causes))
                failed = next((cause for cause in now.causes if cause.__cause__ is not None), None)
                reason = f"cannot {verb} it ({reasons or 'there is no tier for it'})"
                raise TierFullError("every", reason, key) from failed

    def _victim(self, name: str, only_redundant: bool, attempt: Attempt) -> Block | None:
        for digest in self.orders[name]:
            block = self.blocks[digest]
            if block.busy or (name == "disk" and self.reading):
                attempt.met_busy |= block.moved_by != get_ident()
            elif not block.pins and (len(block.tiers) > 1 or not (only_redundant or self._is_last(name))):
                return block
        return None

    def _is_last(self, name: str) -> bool:
        return name == list(self.tiers)[-1]

    def demote(self, block: Block, name: str, attempt: Attempt) -> bool:
        """Move the copy in tier `name` to the next tier that takes it; False when none does, and nothing changed."""
        with self.move(block):
            if self.copy_down(block, name, attempt):
                self.forget(block, name, keep_buffer=self.device.is_host and "host" in block.buffers)
                return True
            return False

    def copy_down(self, block: Block, name: str, attempt: Attempt) -> bool:
        """Make a copy of a busy block in the next tier below `name` that takes it, or has one."""
        names = list(self.tiers)
        for lower in names[names.index(name) + 1 :]:
            if block.holds(lower):
                return True
            tier = self.tiers[lower]
            size = tier.size(block.key, block.layout)
            if not self.reserve(lower, size, attempt):
                attempt.causes.append(TierFullError(lower, f"has no room for {size} bytes", block.key))
                continue
            try:
                with self.unlocked(stalls=tier):
                    buffer = self._copy(block, name, lower)
            except TierError as error:
                attempt.causes.append(error)
                if lower != "disk":
                    tier.ledger.release(size)
                continue
            self.publish(block, lower, buffer)
            self.tiers[name].ledger.count(bytes_out=block.layout.nbytes)
            return True
        return False

    def _copy(self, block: Block, name: str, lower: str) -> Tensor | None:
        source = block.buffers[name]
        if lower == "disk":
            self.write(block, source, name)
            return None
        if self.device.is_host:
            return source  # the same memory under the other account
        target = self.new_buffer(lower, block.layout.nbytes)
        self.transfer.store(source, target)
        return target

    def write(self, block: Block, source: Tensor, name: str) -> None:
        """Write a buffer of tier `name` to disk. Called without the lock. Raises TierFullError, TierWriteError."""
        if self.device.is_host or name == "host":
            self.need_disk().write(block.key, block.layout, block.layout.views(source))
            return
        with self.staging(block) as buffer:
            self.transfer.store(source, buffer)
            self.need_disk().write(block.key, block.layout, block.layout.views(buffer))

    @contextmanager
    def staging(self, block: Block) -> Iterator[Tensor]:
        """A host buffer for a copy between device and disk, counted in the host tier if there is one."""
        host = self.tiers.get("host")
        size = self.device.host_bytes(block.layout.nbytes)
        if host is not None and not host.ledger.reserve(size):
            raise TierFullError("host", f"has no room for {size} bytes on their way", block.key)
        try:
            buffer = self.new_buffer("host", block.layout.nbytes)
            try:
                yield buffer
            finally:
                self.transfer.free_host(buffer)
        finally:
            if host is not None:
                host.ledger.release(size)

    def need_disk(self) -> DiskTier:
        """The disk tier. Raises TierError when there is none."""
        if self.disk is None:
            raise TierError("disk", "there is no disk tier")
        return self.disk
