"""A write is there as a whole or not at all, whatever stops it: an error, a limit of the system, or SIGKILL."""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpress.offload import BlockKey, BlockLayout, Offload, TierFullError, TierManager
from kvpress.offload.format import read_block, write_block
from kvpress.offload.namespace import Namespace, remove_orphans
from kvpress.offload.store import FileStore
from kvpress.testing.faulty_store import FaultyStore

OLD, NEW = BlockKey("cache", 0, 0), BlockKey("cache", 0, 1)
# A block of five tensors is six writes: the header and each tensor.
POINTS = [
    ("open_temporary", 0), ("write", 0), ("write", 1), ("write", 3), ("write", 5), ("fsync", 0), ("rename", 0),
    ("fsync_directory", 0),
]  # fmt: skip


def is_exact(folder: Path, key: BlockKey, tensors: dict[str, Tensor], same: Callable[..., bool]) -> bool:
    out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    store = FileStore(folder)
    try:
        read_block(store, key.digest, key.description(), BlockLayout.of(tensors), out)
    finally:
        store.close()
    return same(out, tensors)


def child_of(
    root: Path, kill_at: tuple[str, str, int], old: dict[str, Tensor], key: BlockKey, new: dict[str, Tensor]
) -> Callable[[], None]:
    """A child that writes the block OLD, and is killed while it writes `new` under `key`."""

    def work() -> None:
        store = FaultyStore(Namespace(root).path)
        write_block(store, OLD.digest, OLD.description(), BlockLayout.of(old), old)
        store.calls.clear()
        store.kill_at = kill_at
        write_block(store, key.digest, key.description(), BlockLayout.of(new), new)

    return work


def test_a_process_killed_at_any_step_leaves_no_torn_block(
    tmp_path: Path,
    tensors_of: Callable[..., dict[str, Tensor]],
    same: Callable[..., bool],
    in_child: Callable[[Callable[[], object]], tuple[int, str]],
) -> None:
    living = Namespace(tmp_path)
    runs = temporaries = visible = 0
    cases = list(product(POINTS, ("before", "after"), (False, True))) * 7
    for seed, ((step, call), moment, overwrite) in enumerate(cases):
        old, new = tensors_of(2 * seed), tensors_of(2 * seed + 1)
        ended_by, text = in_child(child_of(tmp_path, (step, moment, call), old, OLD if overwrite else NEW, new))
        assert ended_by == signal.SIGKILL, text
        runs += 1
        (folder,) = [path for path in tmp_path.iterdir() if path != living.path]
        renamed = step == "fsync_directory" or (step, moment) == ("rename", "after")
        if overwrite:
            assert is_exact(folder, OLD, new if renamed else old, same)
        else:
            assert is_exact(folder, OLD, old, same)
            assert (folder / NEW.digest).exists() == renamed
            assert not renamed or is_exact(folder, NEW, new, same)
        visible += renamed
        temporaries += any(path.suffix == ".tmp" for path in folder.iterdir())
        assert remove_orphans(tmp_path) == [folder]
        assert list(tmp_path.iterdir()) == [living.path]
    assert runs >= 200
    assert 0 < visible < runs and temporaries > 100  # kills fell on both sides of the rename
    living.close()
    assert list(tmp_path.iterdir()) == []


class UnsafeStore(FaultyStore):
    """Writes to the final name at once: what the test above must notice."""

    def write_atomic(self, name: str, chunks: object) -> int:
        file = self.step("open_temporary", os.open, self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        return sum(self.step("write", os.write, file, chunk) for chunk in chunks)  # type: ignore[attr-defined]


def test_a_write_without_a_temporary_file_would_be_noticed(
    tmp_path: Path,
    tensors_of: Callable[..., dict[str, Tensor]],
    in_child: Callable[[Callable[[], object]], tuple[int, str]],
) -> None:
    old = tensors_of(1)

    def work() -> None:
        store = UnsafeStore(tmp_path)
        store.kill_at = ("write", "after", 2)
        write_block(store, OLD.digest, OLD.description(), BlockLayout.of(old), old)

    assert in_child(work)[0] == signal.SIGKILL
    assert (tmp_path / OLD.digest).exists()


@pytest.mark.parametrize("step", ["open_temporary", "write", "fsync", "rename", "fsync_directory"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EINTR])
def test_a_failed_write_leaves_nothing(
    step: str, error: int, tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]], same: Callable[..., bool]
) -> None:
    store, tensors = FaultyStore(tmp_path), tensors_of(1)
    store.errors[step], store.times[step] = error, 1
    with pytest.raises(OSError) as caught:
        write_block(store, OLD.digest, OLD.description(), BlockLayout.of(tensors), tensors)
    assert caught.value.errno == error
    assert list(tmp_path.iterdir()) == [] and store.leftovers == []
    write_block(store, OLD.digest, OLD.description(), BlockLayout.of(tensors), tensors)
    assert is_exact(tmp_path, OLD, tensors, same)


def test_short_writes_are_continued(
    tmp_path: Path, tensors_of: Callable[..., dict[str, Tensor]], same: Callable[..., bool]
) -> None:
    class ShortStore(FaultyStore):
        def step(self, name, function, *arguments, **options):  # type: ignore[no-untyped-def]
            if name == "write":
                arguments = (arguments[0], arguments[1][:5])
            if name == "read":
                arguments = (arguments[0], [arguments[1][0][:3]], arguments[2])
            return super().step(name, function, *arguments, **options)

    store, tensors = ShortStore(tmp_path), tensors_of(1)
    write_block(store, OLD.digest, OLD.description(), BlockLayout.of(tensors), tensors)
    out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_block(store, OLD.digest, OLD.description(), BlockLayout.of(tensors), out)
    assert same(out, tensors)
    assert store.calls["write"] > 20 and store.calls["read"] > 20


def fill(root: Path, tensors: dict[str, Tensor], host: int, same: Callable[..., bool]) -> str:
    """Put blocks until no tier takes one, and check that all that were taken come back."""
    with TierManager(Offload(host=host, disk=root)) as manager:
        taken = []
        failure = None
        for index in range(64):
            key = BlockKey("cache", 0, index)
            try:
                manager.put(key, tensors, "cache")
                taken.append(key)
            except TierFullError as error:
                failure = error
                break
        if failure is None or key in manager:
            raise AssertionError("it was never full, or the failed block is visible")
        if any(path.suffix == ".tmp" for path in root.rglob("*")):
            raise AssertionError("a temporary file stayed behind")
        for kept in taken:
            out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            if not manager.read_into(kept, out) or not same(out, tensors):
                raise AssertionError(f"{kept} came back wrong")
        return f"{len(taken)} {failure}"


def test_a_file_size_limit_of_the_system_is_a_full_tier(
    tmp_path: Path, same: Callable[..., bool], in_child: Callable[[Callable[[], object]], tuple[int, str]]
) -> None:
    tensors = {"key": torch.arange(2000, dtype=torch.float32)}

    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return fill(tmp_path, tensors, 20_000, same)

    ended_by, text = in_child(work)
    assert ended_by == 0 and text.startswith("2 every tier"), text  # two blocks fit in the memory that is left
    assert "File too large" in text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_full_tier(small_disk: Path, same: Callable[..., bool]) -> None:
    tensors = {"key": torch.arange(2000, dtype=torch.float32)}
    text = fill(small_disk, tensors, 20_000, same)
    assert "No space left" in text
    assert int(text.split()[0]) > 2  # some of them went to the disk
    assert list(small_disk.iterdir()) == []
