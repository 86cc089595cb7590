"""The manager under limits, faults, several owners and several threads."""

import copy
import errno
import gc
import os
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpress.offload import (
    BlockKey,
    Offload,
    TierClosedError,
    TierCorruptError,
    TierFullError,
    TierLostError,
    TierManager,
    TierReadError,
)
from kvpress.testing.faulty_store import FaultyStore

BLOCK = 240  # bytes of the tensors that `make(...)` returns


def key_of(index: int, layer: int = 0) -> BlockKey:
    return BlockKey("cache", layer, index)


def make(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "key": torch.randn(4, 12, generator=generator).to(torch.bfloat16),
        "value": torch.randn(4, 12, generator=generator).to(torch.bfloat16),
        "score": torch.randn(12, generator=generator),
    }


class Stores:
    """Opens stores and keeps the last one at hand."""

    def __call__(self, path: Path) -> FaultyStore:
        self.last = FaultyStore(path)
        return self.last


def manager_on(folder: Path, host: int | None = 2 * BLOCK, **options: object) -> tuple[TierManager, FaultyStore]:
    stores = Stores()
    manager = TierManager(Offload(host=host, disk=folder, **options), open_store=stores)  # type: ignore[arg-type]
    return manager, stores.last


def test_blocks_come_back_from_every_tier(tmp_path: Path, same: Callable[..., bool]) -> None:
    with TierManager(Offload(device=2 * BLOCK, host=3 * BLOCK, disk=tmp_path)) as manager:
        for index in range(10):
            manager.put(key_of(index), make(index), "cache")
        places = [manager.tiers_of(key_of(index)) for index in range(10)]
        assert places == [["disk"]] * 5 + [["host"]] * 3 + [["device"]] * 2  # least recently used farthest
        for index in range(10):
            found = manager.get(key_of(index))
            assert found is not None and same(found, make(index))
            assert manager.tiers_of(key_of(index))[0] == "device"  # promoted
        statistics = manager.statistics()
        assert manager.get(key_of(10)) is None
    # Blocks that leave the device go to host memory, although a copy of them is still on disk.
    assert statistics["disk"].hits == 10 and statistics["disk"].bytes_out > 10 * BLOCK
    assert statistics["device"].misses == 10
    assert statistics["disk"].stall_seconds > 0
    assert all(s.peak_bytes <= (s.limit or 1 << 60) for s in statistics.values())
    assert list(tmp_path.iterdir()) == []


def test_read_into_takes_no_room(tmp_path: Path, same: Callable[..., bool]) -> None:
    manager, _ = manager_on(tmp_path, host=None)
    with manager:
        manager.put(key_of(0), make(0), "cache")
        out = make(1)
        assert manager.read_into(key_of(0), out) and same(out, make(0)) and not same(make(1), make(0))
        assert not manager.read_into(key_of(1), out)
        with pytest.raises(ValueError, match="match the block"):
            manager.read_into(key_of(0), {"key": out["key"]})
        with pytest.raises(TierFullError, match="no tier for it"):
            manager.get(key_of(0))
        strided = {name: torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0] for name, t in out.items()}
        assert manager.read_into(key_of(0), strided) and same(strided, make(0))


def test_a_pinned_block_stays(tmp_path: Path) -> None:
    manager, _ = manager_on(tmp_path)
    with manager:
        with pytest.raises(TierLostError):
            manager.pin(key_of(0))
        manager.put(key_of(0), make(0), "cache")
        with manager.use([key_of(0)]) as (found,):
            for index in range(1, 6):
                manager.put(key_of(index), make(index), "cache")
                assert manager.tiers_of(key_of(0)) == ["host"]
            assert not manager.evict(key_of(0))
            assert found["key"].equal(make(0)["key"])
        manager.put(key_of(6), make(6), "cache")
        manager.put(key_of(7), make(7), "cache")
        assert manager.tiers_of(key_of(0)) == ["disk"]
        with pytest.raises(ValueError, match="must be pinned"):
            manager.unpin(key_of(0))
        with pytest.raises(TierLostError), manager.use([key_of(0), key_of(99)]):
            pass
        assert manager.evict(key_of(0)), "use() must unpin what it pinned before it failed"


def test_all_pinned_is_refused_and_not_overrun() -> None:
    with TierManager(Offload(host=2 * BLOCK)) as manager:
        for index in range(2):
            manager.put(key_of(index), make(index), "cache")
            manager.pin(key_of(index))
        with pytest.raises(TierFullError, match="host has no room for 240 bytes"):
            manager.put(key_of(2), make(2), "cache")
        assert key_of(2) not in manager and manager.statistics()["host"].bytes == 2 * BLOCK
        manager.unpin(key_of(0))
        with pytest.raises(TierFullError):
            manager.put(key_of(2), make(2), "cache")  # nothing below takes the unpinned one
        manager.drop("cache", [key_of(0)])
        manager.put(key_of(2), make(2), "cache")


def test_a_fork_shares_blocks_until_the_last_owner_lets_go(tmp_path: Path, same: Callable[..., bool]) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        for index in range(4):
            manager.put(key_of(index), make(index), "parent")
        before = {name: s.bytes for name, s in manager.statistics().items()}
        assert manager.share("parent", "fork") == 4 and manager.share("nobody", "fork") == 0
        assert {name: s.bytes for name, s in manager.statistics().items()} == before  # not one byte is copied
        manager.drop("parent", [key_of(0)])
        manager.drop("parent")
        for index in range(4):
            found = manager.get(key_of(index))
            assert found is not None and same(found, make(index))
        manager.drop("fork")
        assert all(s.blocks == 0 for s in manager.statistics().values())
        assert store.names() == [] and manager.statistics()["host"].bytes == 0


def test_a_dropped_block_lives_while_it_is_pinned(same: Callable[..., bool]) -> None:
    with TierManager(Offload(host=BLOCK)) as manager:
        manager.put(key_of(0), make(0), "cache")
        with manager.use([key_of(0)]) as (found,):
            manager.drop("cache")
            assert manager.get(key_of(0)) is None and key_of(0) not in manager
            with pytest.raises(ValueError, match="must be new"):
                manager.put(key_of(0), make(1), "cache")
            assert manager.statistics()["host"].bytes == BLOCK and same(found, make(0))
        assert manager.statistics()["host"].bytes == 0
        manager.put(key_of(0), make(1), "cache")


def test_a_spilled_block_is_given_up_for_free(tmp_path: Path, same: Callable[..., bool]) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        manager.put(key_of(0), make(0), "cache")
        manager.spill([key_of(0)])
        manager.wait()
        assert manager.tiers_of(key_of(0)) == ["host", "disk"]
        written = store.calls["write"]
        assert manager.evict(key_of(0)) and manager.tiers_of(key_of(0)) == ["disk"]
        assert store.calls["write"] == written > 0
        manager.prefetch([key_of(0)])
        manager.wait()
        assert manager.tiers_of(key_of(0)) == ["host", "disk"]
        read = store.calls["read"]
        found = manager.get(key_of(0))
        assert found is not None and same(found, make(0)) and store.calls["read"] == read


# --- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("step", ["open_temporary", "write", "fsync", "rename", "fsync_directory"])
def test_a_broken_disk_leaves_the_blocks_in_memory(
    error: int, step: str, tmp_path: Path, same: Callable[..., bool]
) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        store.errors[step] = error
        for index in range(2):
            manager.put(key_of(index), make(index), "cache")
        with pytest.raises(TierFullError, match=os.strerror(error)) as caught:
            manager.put(key_of(2), make(2), "cache")
        assert not caught.value.lost and caught.value.__cause__ is not None
        assert key_of(2) not in manager and store.names() == []
        for index in range(2):
            found = manager.get(key_of(index))
            assert found is not None and same(found, make(index))
        store.errors.clear()
        manager.put(key_of(2), make(2), "cache")
        assert len(store.names()) == 1
        assert manager.statistics()["disk"].failures > 0


def test_one_failed_write_costs_nothing(tmp_path: Path, same: Callable[..., bool]) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        store.errors["write"], store.times["write"] = errno.EIO, 1
        for index in range(3):
            manager.put(key_of(index), make(index), "cache")
        assert store.times["write"] == 0
        for index in range(3):
            found = manager.get(key_of(index))
            assert found is not None and same(found, make(index))


def on_disk(manager: TierManager, index: int) -> BlockKey:
    key = key_of(index)
    manager.put(key, make(index), "cache")
    assert manager.evict(key) and manager.tiers_of(key) == ["disk"]
    return key


def test_a_read_error_is_tried_again_and_the_block_kept(tmp_path: Path, same: Callable[..., bool]) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        key = on_disk(manager, 0)
        store.errors["read"], store.times["read"] = errno.EIO, 1
        found = manager.get(key)
        assert found is not None and same(found, make(0)) and store.times["read"] == 0
        assert manager.evict(key)
        del store.times["read"]
        for _ in range(3):
            with pytest.raises(TierReadError, match="Input/output error") as caught:
                manager.get(key)
            with pytest.raises(TierReadError):
                manager.read_into(key, make(1))
            assert not caught.value.lost and key in manager
        manager.prefetch([key])
        manager.wait()
        store.errors.clear()
        found = manager.get(key)
        assert found is not None and same(found, make(0))


@pytest.mark.parametrize("by_prefetch", [False, True])
def test_a_damaged_block_is_reported_once_and_gone(by_prefetch: bool, tmp_path: Path) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        key = on_disk(manager, 0)
        path = store.directory / key.digest
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        if by_prefetch:
            manager.prefetch([key])
            manager.wait()
        with pytest.raises(TierCorruptError, match="the block is lost") as caught:
            manager.get(key)
        assert str(caught.value.key) in str(caught.value)
        assert manager.get(key) is None and key not in manager and not path.exists()
        statistics = manager.statistics()
        assert statistics["host"].bytes == 0 and statistics["disk"].blocks == 0
        manager.put(key, make(5), "cache")  # the name is free again


def test_a_vanished_file_or_directory_is_a_loss_not_a_crash(tmp_path: Path) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        first, second = on_disk(manager, 0), on_disk(manager, 1)
        (store.directory / first.digest).unlink()
        with pytest.raises(TierLostError):
            manager.get(first)
        assert manager.get(first) is None
        moved = store.directory.rename(tmp_path / "moved")
        store.directory.symlink_to(moved)  # somebody put a link in its place
        assert manager.get(second) is not None  # the open handle still leads to the right directory
        assert manager.evict(second)
        for path in moved.iterdir():
            path.unlink()
        moved.rmdir()
        with pytest.raises(TierLostError):
            manager.get(second)
        for index in (2, 3):
            manager.put(key_of(index), make(index), "cache")
        with pytest.raises(TierFullError, match="No such file"):
            manager.put(key_of(4), make(4), "cache")


def test_a_file_that_cannot_be_removed_stays_on_the_account(tmp_path: Path, bytes_in: Callable[[Path], int]) -> None:
    manager, store = manager_on(tmp_path, disk_limit=2000)
    with manager:
        for index in range(2):
            on_disk(manager, index)
        store.errors["unlink"] = errno.EIO
        manager.drop("cache")
        assert manager.statistics()["disk"].bytes == bytes_in(tmp_path) > 1000
        store.errors.clear()
        on_disk(manager, 2)  # the next write clears up first
        assert manager.statistics()["disk"].bytes == bytes_in(tmp_path)
        assert len(store.names()) == 1


def test_a_slow_disk_only_costs_time(tmp_path: Path, same: Callable[..., bool]) -> None:
    manager, store = manager_on(tmp_path)
    with manager:
        key = on_disk(manager, 0)
        store.delay["read"] = 0.02
        manager.prefetch([key])
        found = manager.get(key)  # waits for the read under way, or reads itself
        assert found is not None and same(found, make(0))
        manager.wait()
        assert store.calls["read"] <= 8


# --- life ------------------------------------------------------------------------------------------------------


def test_a_closed_manager_says_so(tmp_path: Path) -> None:
    manager, _ = manager_on(tmp_path)
    manager.put(key_of(0), make(0), "cache")
    manager.close()
    manager.close()
    with pytest.raises(TierClosedError):
        manager.get(key_of(0))
    with pytest.raises(TierClosedError):
        manager.put(key_of(1), make(1), "cache")


def test_a_manager_cannot_be_copied_or_pickled() -> None:
    with TierManager(Offload(host=100)) as manager:
        with pytest.raises(TypeError, match="share"):
            copy.deepcopy(manager)
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(manager)


def test_a_forked_child_leaves_its_parents_blocks_alone(
    tmp_path: Path, same: Callable[..., bool], in_child: Callable[[Callable[[], object]], tuple[int, str]]
) -> None:
    manager, _ = manager_on(tmp_path)
    with manager:
        key = on_disk(manager, 0)

        def work() -> str:
            try:
                manager.get(key)
            except TierClosedError as error:
                manager.close()
                manager._mover.disk.close()  # type: ignore[union-attr]
                return str(error)
            return "it read"

        assert "fork" in in_child(work)[1]
        found = manager.get(key)
        assert found is not None and same(found, make(0))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_leaks_in_a_thousand_cycles(tmp_path: Path, bytes_in: Callable[[Path], int]) -> None:
    files, threads = open_files(), threading.active_count()
    for cycle in range(20):
        manager, store = manager_on(tmp_path, disk_limit=100_000)
        at_start = bytes_in(tmp_path)
        held = open_files()
        for turn in range(50):
            keys = [BlockKey("cache", turn, index, cycle) for index in range(3)]
            for index, key in enumerate(keys):
                manager.put(key, make(index), "cache")
            manager.prefetch(keys[:1])
            assert manager.get(keys[0]) is not None
            manager.drop("cache")
        manager.wait()
        assert store.calls["write"] > 50
        assert bytes_in(tmp_path) == at_start and store.names() == []
        assert open_files() == held
        assert all(s.bytes == (at_start if n == "disk" else 0) for n, s in manager.statistics().items())
        assert not manager._mover.blocks and manager._mover.moving == 0
        manager.close()
    gc.collect()
    assert open_files() == files and threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


def test_threads_share_one_manager(tmp_path: Path, same: Callable[..., bool]) -> None:
    """Many threads put, read, prefetch, evict and drop under limits that hold hardly more than they pin."""
    errors: list[BaseException] = []
    reads = [0] * 6
    options = Offload(device=4 * BLOCK, host=8 * BLOCK, disk=tmp_path, disk_limit=100_000)
    with TierManager(options) as manager:

        def work(thread: int) -> None:
            source = random.Random(thread)
            mine: dict[BlockKey, int] = {}
            try:
                for turn in range(120):
                    key = BlockKey(f"cache{thread}", 0, turn)
                    manager.put(key, make(1000 * thread + turn), f"cache{thread}")
                    mine[key] = 1000 * thread + turn
                    some = source.sample(sorted(mine, key=lambda k: k.block), min(3, len(mine)))
                    manager.prefetch(some)
                    for wanted in some:
                        if source.random() < 0.3:
                            manager.evict(wanted)
                        if source.random() < 0.5:
                            out = make(0)
                            found = out if manager.read_into(wanted, out) else None
                            right = found is not None and same(found, make(mine[wanted]))
                        else:
                            with manager.use([wanted]) as (tensors,):
                                right = same(tensors, make(mine[wanted]))
                        if not right:
                            raise AssertionError(f"{wanted} came back wrong")
                        reads[thread] += 1
                    if len(mine) > 20:
                        gone = source.sample(sorted(mine, key=lambda k: k.block), 10)
                        manager.drop(f"cache{thread}", gone)
                        for key in gone:
                            del mine[key]
                manager.drop(f"cache{thread}")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not errors, errors
        assert min(reads) > 200
        manager.wait()
        statistics = manager.statistics()
        assert all(s.blocks == 0 for s in statistics.values())
        assert statistics["device"].bytes == statistics["host"].bytes == 0
        assert all(s.peak_bytes <= (s.limit or 0) for s in statistics.values())
        assert statistics["disk"].bytes_in > 0 and manager._mover.moving == 0
