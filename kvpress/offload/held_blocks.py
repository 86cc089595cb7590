"""Blocks that the tiers hold: which there are, who relies on them, and what becomes of one that is lost."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from kvpress.offload.block import Block
from kvpress.offload.errors import TierClosedError, TierLostError
from kvpress.offload.key import BlockKey
from kvpress.offload.mover import Mover


class HeldBlocks:
    """The blocks of one process's tiers. Safe to use from several threads.

    Args:
        mover: knows the blocks, and moves them between tiers.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._process = os.getpid()
        self._closed = False

    def __contains__(self, key: BlockKey) -> bool:
        with self._mover.lock:
            block = self._mover.blocks.get(key.digest)
            return block is not None and bool(block.owners) and bool(block.tiers)

    def tiers_of(self, key: BlockKey) -> list[str]:
        """Names of the tiers that hold a copy of the block, the nearest first."""
        with self._locked():
            block = self._settled(key)
            return [] if block is None else block.tiers

    def pin(self, key: BlockKey) -> None:
        """Keep every copy of the block where it is until `unpin`. Raises TierLostError for a block not held."""
        with self._locked():
            block = self._settled(key)
            if block is None:
                raise TierLostError("manager", "is not held", key)
            block.pins += 1

    def unpin(self, key: BlockKey) -> None:
        """Undo one `pin`. Raises ValueError when the block is not pinned."""
        with self._locked() as mover:
            block = mover.blocks.get(key.digest)
            if block is None or not block.pins:
                raise ValueError(f"key must be pinned, got {key}")
            block.pins -= 1
            mover.collect(block)
            mover.changed()

    def share(self, source: str, target: str) -> int:
        """Make `target` an owner of every block of `source`, as a forked cache is; returns how many."""
        with self._locked() as mover:
            shared = [block for block in mover.blocks.values() if source in block.owners]
            for block in shared:
                block.owners.add(target)
            return len(shared)

    def drop(self, owner: str, keys: Iterable[BlockKey] | None = None) -> None:
        """`owner` no longer relies on the blocks `keys`, or on any; a block without owners is removed."""
        with self._locked() as mover:
            digests = None if keys is None else {key.digest for key in keys}
            for block in list(mover.blocks.values()):
                if owner in block.owners and (digests is None or block.key.digest in digests):
                    block.owners.discard(owner)
                    mover.collect(block)
            mover.changed()

    # --- inside ------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[Mover]:
        if os.getpid() != self._process:
            raise TierClosedError("manager", f"belongs to process {self._process}, of which this one is a fork")
        with self._mover.lock:
            if self._closed:
                raise TierClosedError("manager", "is closed")
            yield self._mover

    def _settled(self, key: BlockKey) -> Block | None:
        """The block once nobody moves it, or None when it is not held."""
        while (block := self._mover.blocks.get(key.digest)) is not None and block.busy:
            self._mover.lock.wait()
        return block if block is not None and block.owners else None

    @contextmanager
    def _reading(self, block: Block) -> Iterator[None]:
        block.pins += 1
        self._mover.moving += 1
        try:
            yield
        finally:
            block.pins -= 1
            self._mover.moving -= 1
            self._mover.collect(block)
            self._mover.changed()

    def _check_readable(self, block: Block) -> None:
        if block.failure is not None or not block.tiers:
            self._missing(block)

    def _missing(self, block: Block) -> NoReturn:
        failure = block.failure or TierLostError("manager", "has no copy left", block.key)
        block.failure = None
        self._remove_if_lost(block)
        raise failure

    def _remove_if_lost(self, block: Block) -> None:
        if not block.tiers:
            block.owners.clear()
            self._mover.collect(block)

    def _count(self, blocks: Iterable[Block]) -> None:
        """Book a request for each of the blocks: a hit in its nearest tier, a miss in the tiers before it."""
        left = list(blocks)
        for name, tier in self._mover.tiers.items():
            below = [block for block in left if not block.holds(name)]
            tier.ledger.count(hits=len(left) - len(below), misses=len(below))
            if not below:
                return
            left = below
