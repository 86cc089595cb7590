"""The one place that touches the file system, so that every fault can be injected here.

All names are relative to an open directory handle. A directory that is renamed, removed or replaced by a
symbolic link while the store is open therefore cannot lead a read or a write anywhere else.
"""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kvpress.kernels.native import extension
from kvpress.offload.help import Help

if TYPE_CHECKING:
    from kvpress.offload.row_source import RowSource
    from kvpress.offload.slot_rows import RowsWanted

Result = TypeVar("Result")
Background = Callable[[Callable[[], None]], "Future[None]"]

NAME = re.compile(r"[0-9a-f]{64}")
NAME_BYTES = 65  # with the 0 that ends it
TEMPORARY_NAME = re.compile(r"[0-9a-f]{64}\.[0-9]+\.tmp")
WORTH_HELP = 128  # rows of which reading is worth waking another thread
PIECE = 1 << 20  # bytes a hash sees while they are still in the processor's cache
STEPS = ("open_temporary", "write", "fsync", "rename", "fsync_directory", "open", "read", "stat", "unlink")


class FileStore:
    """Whole-file writes and reads of files named by sha256 digests in one directory.

    Args:
        directory: an existing directory, which must not be a symbolic link.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._serial = count()
        self._help = Help()
        self._kept: set[int] = set()  # handles of files that are kept open
        self.leftovers: list[str] = []  # files of failed writes that could not be removed

    def step(self, name: str, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Run one system call of the step `name` (see `STEPS`). Tests override this to inject faults."""
        return function(*arguments, **options)

    def write_atomic(self, name: str, chunks: Iterable[memoryview | bytes]) -> int:
        """Write `chunks` as the file `name`: temporary file, fsync, rename, fsync of the directory.

        Returns the size in bytes. After an OSError no new file `name` is visible, and no temporary file stays
        behind; a file that cannot be removed either is named in `leftovers`.
        """
        temporary = f"{checked(name)}.{next(self._serial)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = self.step("open_temporary", os.open, temporary, flags, 0o600, dir_fd=self._handle)
        renamed = False
        try:
            try:
                size = sum(self._write_all(file, memoryview(chunk)) for chunk in chunks)
                self.step("fsync", os.fsync, file)
            finally:
                os.close(file)
            self.step("rename", os.rename, temporary, name, src_dir_fd=self._handle, dst_dir_fd=self._handle)
            renamed = True
            self.step("fsync_directory", os.fsync, self._handle)
        except BaseException:
            leftover = name if renamed else temporary
            try:
                self._remove(leftover)
            except OSError:
                self.leftovers.append(leftover)
            raise
        return size

    def _write_all(self, file: int, chunk: memoryview) -> int:
        done = 0
        while done < len(chunk):
            done += self.step("write", os.write, file, chunk[done:])
        return done

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open the regular file `name` for reading. Raises OSError; a symbolic link is never followed."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = self.step("open", os.open, checked(name), flags, dir_fd=self._handle)
        try:
            yield OpenFile(self, file)
        finally:
            os.close(file)

    def read_rows(
        self,
        source: RowSource,
        wanted: RowsWanted,
        first: int,
        out: Tensor,
        beside: Background | None = None,
    ) -> int:
        """Read single rows of several files into `out [n, payload]` and check them, by the native kernels where they are built.

        Args:
            source: tells of the files. More of its `handles` may be there afterwards, as many as `opened` grew by: see `let_go`.
            wanted: the rows, of which those of the files before `wanted.blocks[first]` are left out.
            out: uint8, rows of contiguous bytes.
            beside: runs a function on another thread, which reads along where torch computes on one thread only.

        Returns the number of files that were read, from `first` on. What is wrong with the next one, its `open` tells. Raises OSError.
        """
        native = getattr(extension, "read_rows", None)
        if native is None:
            return 0
        count, threads = len(wanted.blocks) - first, torch.get_num_threads()
        handles, known = source.handles, source.handles[:]
        progress = array("q", [0, count, 0, 0, 0, 0, 0])
        names, *of_files = source.addresses
        blocks, firsts = (each.data_ptr() + 8 * first for each in (wanted.blocks, wanted.firsts))
        fields = (
            threads, self._handle, names, NAME_BYTES, *of_files, blocks,
            handles.buffer_info()[0], count, firsts,
            wanted.numbers.data_ptr(), wanted.places.data_ptr(), out.shape[1], out.data_ptr(), out.stride(0),
        )  # fmt: skip

        def take_part(helps: int) -> None:  # holds on to `progress`, which a helper that comes late looks at
            self.step("read", native, *fields, helps, progress.buffer_info()[0])

        helper = None
        if beside is not None and threads == 1 and wanted.rows >= WORTH_HELP and self._help.is_wanted():
            with suppress(RuntimeError):  # the threads have ended meanwhile
                helper = beside(lambda: take_part(1))
        try:
            take_part(0)  # ends when no helper reads any more
        except BaseException:
            if helper is not None and not helper.cancel():
                helper.exception()
            raise
        finally:
            if progress[6]:
                source.opened += progress[6]
                self._kept.update(now for before, now in zip(known, handles, strict=True) if before < 0 <= now)
        if helper is not None:
            helper.cancel()
            _, done, _, own, working, waiting, _ = progress
            self._help.judge(done, own, working, waiting)
        return progress[1]

    def let_go(self, handle: int) -> None:
        """Close a file that `read_rows` kept open; one that is closed is no error."""
        if handle in self._kept and extension is not None:
            self._kept.remove(handle)
            extension.close_file(handle)

    def unlink(self, name: str) -> None:
        """Remove the block or temporary file `name`, or the link of that name; a missing one is no error."""
        self._remove(name if TEMPORARY_NAME.fullmatch(name) else checked(name))

    def _remove(self, name: str) -> None:
        try:
            with suppress(FileNotFoundError):
                self.step("unlink", os.unlink, name, dir_fd=self._handle)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=self._handle)

    def stat(self, name: str) -> os.stat_result:
        """The status of `name` itself, links not followed."""
        return self.step("stat", os.stat, checked(name), dir_fd=self._handle, follow_symlinks=False)

    def names(self) -> list[str]:
        """Names of the blocks and of the temporary files that lie in the directory."""
        entries = os.listdir(self._handle)  # noqa: PTH208 - of the open handle, not of whatever has the path now
        return [n for n in entries if NAME.fullmatch(n) or TEMPORARY_NAME.fullmatch(n)]

    def close(self) -> None:
        """Give the directory handle back. Closing twice is no error."""
        for kept in list(self._kept):
            self.let_go(kept)
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


class OpenFile:
    """A file open for reading, and its size in bytes when it was opened."""

    def __init__(self, store: FileStore, file: int) -> None:
        self._store, self._file = store, file
        status = store.step("stat", os.fstat, file)
        self.is_regular = stat.S_ISREG(status.st_mode)
        self.size = status.st_size

    def read_into(self, buffer: memoryview, offset: int, seen: Callable[[memoryview], object]) -> int:
        """Fill `buffer` from byte `offset` on, straight into place; `seen` gets each piece. Returns the bytes read."""
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + PIECE]
            read = self._store.step("read", os.preadv, self._file, [piece], offset + done)
            if read == 0:
                break
            seen(piece[:read])
            done += read
        return done


def checked(name: str) -> str:
    """`name` when it is 64 hexadecimal digits; anything else, paths above all, is a ValueError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name must be 64 lower-case hexadecimal digits, got {name!r}")
    return name
