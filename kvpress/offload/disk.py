"""The disk tier: blocks as files in a private folder, never more bytes than its limit."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from kvpress.offload.errors import (
    TierCorruptError,
    TierError,
    TierFullError,
    TierLostError,
    TierReadError,
    TierWriteError,
)
from kvpress.offload.format import file_bytes, read_block, read_rows, write_block
from kvpress.offload.key import BlockKey
from kvpress.offload.layout import BlockLayout, memory_of
from kvpress.offload.ledger import Ledger
from kvpress.offload.namespace import Namespace
from kvpress.offload.row_source import RowSource
from kvpress.offload.slot_rows import RowsWanted
from kvpress.offload.store import Background, FileStore

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskTier:
    """Write, read and remove block files. The caller reserves `size(...)` bytes of `ledger` before a write; a write
    that fails, or a removal, gives them back.

    Args:
        root: directory in which the process's own folder is made.
        limit: bytes all files together may have, those being written and the owner file included; None for no limit.
        open_store: makes the file store for a folder.
    """

    name = "disk"

    def __init__(
        self, root: str | os.PathLike[str], limit: int | None, open_store: Callable[[Path], FileStore] = FileStore
    ) -> None:
        self.ledger = Ledger(limit)
        self._lock = Lock()
        self._stuck: dict[str, int] = {}  # files that could not be removed, and their bytes
        namespace = Namespace(root)
        self.path = namespace.path
        try:
            self.store = open_store(namespace.path)
        except BaseException:
            namespace.close()
            raise
        self._close = weakref.finalize(self, _close, namespace, self.store, os.getpid())
        if not self.ledger.reserve(namespace.owner_bytes):
            self.close()
            raise ValueError(f"disk_limit must be at least {namespace.owner_bytes} bytes, got {limit}")

    def size(self, key: BlockKey, layout: BlockLayout) -> int:
        """Bytes of the block's file."""
        return file_bytes(key.description(), layout)

    def write(self, key: BlockKey, layout: BlockLayout, tensors: Mapping[str, Tensor]) -> None:
        """Write a block whose bytes are reserved, trying twice. After a TierFullError or TierWriteError it is not there."""
        size = self.size(key, layout)
        try:
            for attempt in (1, 2):
                try:
                    self._remove_stuck()
                    write_block(self.store, key.digest, key.description(), layout, tensors)
                    break
                except OSError:  # for a reason that may pass; but what is left behind has the bytes that were reserved
                    if attempt == 2 or self._left_behind(key.digest):
                        raise
        except BaseException as error:
            self._forget(key.digest, size)
            if not isinstance(error, OSError):
                raise
            self.ledger.count(failures=1)
            kind = TierFullError if error.errno in FULL else TierWriteError
            raise kind(self.name, f"could not be written ({error.strerror or error})", key) from error
        self.ledger.count(bytes_in=size, blocks=1)

    def read(self, key: BlockKey, layout: BlockLayout, out: Mapping[str, Tensor]) -> None:
        """Read a block into `out`, trying twice.

        Raises:
            TierCorruptError, TierLostError: the block is gone; its file has been removed.
            TierReadError: reading failed twice; the file is kept.
        """
        self._read(key, lambda: read_block(self.store, key.digest, key.description(), layout, out))
        self.ledger.count(bytes_out=self.size(key, layout))

    def read_rows(
        self, source: RowSource, wanted: RowsWanted, out: Tensor, beside: Background | None = None
    ) -> tuple[int, TierError] | None:
        """Read single rows of blocks of slot rows to their places in `out [n, payload]`, `beside` on another thread too.

        Returns None, or which of `wanted.blocks` failed first and why, as `read` would raise it; those places are then undefined.
        """
        first = 0
        while first < len(wanted.blocks):
            with suppress(OSError):  # that file is read again below
                first += self.store.read_rows(source, wanted, first, out, beside)
            if first < len(wanted.blocks):
                try:
                    self._read_slowly(source, wanted, first, out)
                except TierError as error:
                    return first, error
                first += 1
        self.ledger.count(bytes_out=wanted.rows * source.layout.width)
        return None

    def _read_slowly(self, source: RowSource, wanted: RowsWanted, each: int, out: Tensor) -> None:
        """One block's rows, step by step. Raises as `read` does."""
        block, rows = int(wanted.blocks[each]), source.layout
        key, start, size = source.keys[block], int(source.starts[block]), int(source.sizes[block])
        listed, places = wanted.of_block(each)
        numbers = listed.tolist()
        piece = torch.empty(len(numbers), rows.width, dtype=torch.uint8)
        self._read(key, lambda: read_rows(self.store, key, start, size, rows.width, numbers, piece))
        damaged = rows.first_damaged(memory_of(piece), numbers, range(len(numbers)), key)
        if damaged is not None:
            self.ledger.count(failures=1)
            raise TierCorruptError(self.name, f"the checksum of row {damaged} does not match its bytes", key)
        out[places] = piece[:, : rows.payload]

    def _read(self, key: BlockKey, once: Callable[[], None]) -> None:
        try:
            for attempt in (1, 2):
                try:
                    once()
                    break
                except OSError as error:
                    if attempt == 2:
                        raise TierReadError(self.name, f"could not be read ({error.strerror or error})", key) from error
        except (TierCorruptError, TierLostError, TierReadError):
            self.ledger.count(failures=1)
            raise

    def remove(self, key: BlockKey, layout: BlockLayout) -> None:
        """Remove the block's file. When that fails its bytes stay accounted for, and it is tried again later."""
        self.ledger.count(blocks=-1)
        try:
            self.store.unlink(key.digest)
        except OSError:
            self.store.leftovers.append(key.digest)
        self._forget(key.digest, self.size(key, layout))

    def _forget(self, digest: str, size: int) -> None:
        """Give the bytes of a file back, unless the file could not be removed."""
        with self._lock:
            stuck = self._left_behind(digest)
            for name in stuck:
                self.store.leftovers.remove(name)
                self._stuck[name] = size
        if stuck:
            self.ledger.count(failures=1)
        else:
            self.ledger.release(size)

    def _left_behind(self, digest: str) -> list[str]:
        """Files of a block that could not be removed."""
        return [name for name in self.store.leftovers if name.startswith(digest)]

    def sweep(self) -> bool:
        """Try again to remove what could not be removed; True when that gave bytes back."""
        before = len(self._stuck)
        with suppress(OSError):
            self._remove_stuck()
        return len(self._stuck) < before

    def _remove_stuck(self) -> None:
        with self._lock:
            for name in list(self._stuck):
                self.store.unlink(name)
                self.ledger.release(self._stuck.pop(name))

    def close(self) -> None:
        """Remove the folder and everything in it."""
        self._close()


def _close(namespace: Namespace, store: FileStore, process: int) -> None:
    # A forked child inherits this tier, but the folder is its parent's.
    if os.getpid() == process:
        store.close()
        namespace.close()
