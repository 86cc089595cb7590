"""Whatever happens to the tiers, a get returns the exact bytes or says that the block is gone."""

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from kvpress.offload import (
    BlockKey,
    BlockLayout,
    Offload,
    TierCorruptError,
    TierError,
    TierFullError,
    TierLostError,
    TierManager,
    TierReadError,
)
from kvpress.offload.disk import DiskTier
from kvpress.offload.store import STEPS
from kvpress.testing.faulty_store import FaultyStore

torch.set_num_threads(1)
SETTINGS = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, print_blob=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
DEVICE, HOST, DISK = 300, 400, 4000
DAMAGES = ["flip", "cut", "longer", "remove", "link"]
EXPECTED = ["full", "lost", "miss", "hit on disk", "hit in memory", "evicted", "damaged", "restart", "TierReadError"]
OWNERS = st.sampled_from(["first", "second"])


def content(seed: int, slots: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "key": torch.randn(slots, 4, generator=generator).to(torch.bfloat16),
        "position": torch.randint(0, 1 << 40, (slots,), generator=generator),
        "code": torch.randint(-128, 128, (slots, 3), generator=generator, dtype=torch.int8),
    }


def is_exact(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[n].contiguous().view(torch.uint8), t.view(torch.uint8)) for n, t in wanted.items()
    )


class WatchfulStore(FaultyStore):
    """Checks the limit of the disk after every single system call."""

    most = 0

    def step(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            return super().step(name, *arguments, **options)
        finally:
            total = sum(path.lstat().st_size for path in self.directory.iterdir())
            WatchfulStore.most = max(WatchfulStore.most, total)
            assert total <= DISK, f"{total} bytes on disk"


class TierMachine(RuleBasedStateMachine):
    manager_class: type[TierManager] = TierManager
    reached: dict[str, int] = {}  # noqa: RUF012 - counted over all examples, to show that the tests were not vacuous
    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model: dict[BlockKey, tuple[dict[str, Tensor], set[str]]] = {}
        self.damaged: set[BlockKey] = set()
        self.pinned: list[tuple[BlockKey, dict[str, Tensor]]] = []
        self.generation = 0
        self.open()

    def open(self) -> None:
        options = Offload(device=DEVICE, host=HOST, disk=self.folder.name, disk_limit=DISK)
        self.manager = self.manager_class(options, open_store=self.keep_store)

    def keep_store(self, path: Path) -> WatchfulStore:
        self.store = WatchfulStore(path)
        return self.store

    def note(self, what: str) -> None:
        TierMachine.reached[what] = TierMachine.reached.get(what, 0) + 1

    # --- rules -------------------------------------------------------------------------------------------------

    @rule(target=keys, slots=st.lists(st.integers(1, 8), min_size=1, max_size=6), block=st.integers(0, 3), owner=OWNERS)
    def put(self, slots: list[int], block: int, owner: str) -> Any:
        keys = [self.put_one(count, block, owner) for count in slots]
        return multiple(*(key for key in keys if key is not None))

    def put_one(self, slots: int, block: int, owner: str) -> BlockKey | None:
        self.generation += 1
        key = BlockKey("cache", 0, block, self.generation)
        wanted = content(self.generation, slots)
        try:
            self.manager.put(key, wanted, owner)
        except TierFullError:
            self.note("full")
            assert key not in self.manager and self.manager.get(key) is None
            return None
        self.model[key] = ({n: t.clone() for n, t in wanted.items()}, {owner})
        for tensor in wanted.values():
            tensor.zero_()  # the manager must hold its own copy
        return key

    @rule(key=keys)
    def put_twice(self, key: BlockKey) -> None:
        if key in self.model and key not in self.damaged:
            with pytest.raises(ValueError, match="new generation"):
                self.manager.put(key, content(0, 1), "first")

    @rule(key=keys, pin=st.booleans())
    def get(self, key: BlockKey, pin: bool) -> None:
        found = self.expect(key, lambda: self.manager.get(key, pin=pin))
        if found is not None and pin:
            self.pinned.append((key, found))

    @rule(key=keys)
    def read_into(self, key: BlockKey) -> None:
        self.read_one(key)

    def read_one(self, key: BlockKey) -> None:
        if key not in self.model:
            return
        out = {name: torch.full_like(tensor, 1) for name, tensor in self.model[key][0].items()}
        self.expect(key, lambda: out if self.manager.read_into(key, out) else None)

    def expect(self, key: BlockKey, read: Any) -> dict[str, Tensor] | None:
        from_disk = self.manager.tiers_of(key) == ["disk"]
        try:
            found = read()
        except (TierCorruptError, TierLostError) as error:
            self.note("lost")
            assert key in self.damaged and error.lost
            assert read() is None and key not in self.manager  # withdrawn: no livelock
            self.model.pop(key)
            return None
        except (TierFullError, TierReadError) as error:
            self.note(type(error).__name__)
            assert key in self.model and key in self.manager
            return None
        if found is None:
            self.note("miss")
            assert key not in self.model
            return None
        self.note("hit on disk" if from_disk else "hit in memory")
        assert is_exact(found, self.model[key][0])
        return found

    @rule(error=st.sampled_from([errno.EIO, None]))
    def read_everything(self, error: int | None) -> None:
        if error is not None:
            self.store.errors["read"] = error
        for key in list(self.model):
            self.read_one(key)

    @rule(wanted=st.lists(keys, max_size=4))
    def prefetch(self, wanted: list[BlockKey]) -> None:
        for key in wanted:  # one at a time, so that a failing example can be replayed
            self.manager.prefetch([key])
            self.manager.wait()

    @rule(wanted=st.lists(keys, max_size=4))
    def spill(self, wanted: list[BlockKey]) -> None:
        for key in wanted:
            self.manager.spill([key])
            self.manager.wait()

    @rule(key=keys, steps=st.integers(1, 2))
    def evict(self, key: BlockKey, steps: int) -> None:
        for _ in range(steps):
            self.note("evicted" if self.manager.evict(key) else "not evicted")

    @rule()
    def unpin(self) -> None:
        if self.pinned:
            key, tensors = self.pinned.pop()
            if key in self.model:
                assert is_exact(tensors, self.model[key][0])
            self.manager.unpin(key)

    @rule(source=OWNERS, other=OWNERS)
    def share(self, source: str, other: str) -> None:
        self.manager.share(source, other)
        for _, owners in self.model.values():
            if source in owners:
                owners.add(other)

    @rule(owner=OWNERS)
    def drop(self, owner: str) -> None:
        self.manager.drop(owner)
        for key, (_, owners) in list(self.model.items()):
            owners.discard(owner)
            if not owners:
                del self.model[key]

    @precondition(lambda self: self.on_disk())
    @rule(kind=st.sampled_from(DAMAGES), place=st.integers(0, 10_000), ask=st.booleans())
    def damage(self, kind: str, place: int, ask: bool) -> None:
        key = self.on_disk()[place % len(self.on_disk())]
        path = self.store.directory / key.digest
        self.note("damaged")
        self.damaged.add(key)
        data = bytearray(path.read_bytes())
        if kind == "remove":
            path.unlink()
        elif kind == "link":
            path.unlink()
            path.symlink_to("/dev/null")
        elif not data:
            pass  # cut to nothing before: nothing is left to cut or to flip
        elif kind == "cut":
            path.write_bytes(data[: place % len(data)])
        elif kind == "longer":
            if sum(p.stat().st_size for p in self.store.directory.iterdir()) < DISK:
                path.write_bytes(bytes(data) + b"\0")
        else:
            data[place % len(data)] ^= 1 << place % 8
            path.write_bytes(data)
        if ask:
            self.read_one(key)

    def on_disk(self) -> list[BlockKey]:
        paths = [(key, self.store.directory / key.digest) for key in self.model]
        return [key for key, path in paths if path.is_file() and not path.is_symlink()]

    @rule(
        step=st.sampled_from([step for step in STEPS if step != "stat"]),
        error=st.sampled_from([errno.EIO, errno.ENOSPC]),
        times=st.sampled_from([1, 2, None]),
    )
    def break_disk(self, step: str, error: int, times: int | None) -> None:
        self.store.errors[step] = error
        self.store.times.pop(step, None)
        if times is not None:
            self.store.times[step] = times

    @rule()
    def mend_disk(self) -> None:
        self.store.errors.clear()
        self.store.times.clear()

    @rule(chance=st.integers(0, 3))
    def restart(self, chance: int) -> None:
        if chance:
            return
        self.note("restart")
        self.manager.close()
        assert list(Path(self.folder.name).iterdir()) == []
        self.open()
        for key in self.model:
            assert self.manager.get(key) is None
        self.model.clear()
        self.damaged.clear()
        self.pinned.clear()

    # --- invariants --------------------------------------------------------------------------------------------

    @invariant()
    def limits_hold(self) -> None:
        statistics = self.manager.statistics()
        for name, limit in (("device", DEVICE), ("host", HOST), ("disk", DISK)):
            assert 0 <= statistics[name].bytes <= statistics[name].peak_bytes <= limit
        for name in ("device", "host"):
            held = [b for b in self.manager._mover.blocks.values() if name in b.buffers]
            assert sum(b.buffers[name].untyped_storage().nbytes() for b in held) == statistics[name].bytes
        if not self.damaged:
            files = {path.name: path.stat().st_size for path in self.store.directory.iterdir()}
            stuck = self.manager._mover.disk._stuck  # half written, not removable: counted at the size reserved
            assert all(files.get(name, 0) <= size for name, size in stuck.items())
            assert sum((files | stuck).values()) == statistics["disk"].bytes

    @invariant()
    def nothing_is_forgotten(self) -> None:
        for key in self.model:
            assert key in self.manager or key in self.damaged

    def teardown(self) -> None:
        self.manager.close()
        assert list(Path(self.folder.name).iterdir()) == []
        self.folder.cleanup()


def test_a_get_returns_the_exact_bytes_or_a_miss() -> None:
    TierMachine.reached.clear()
    WatchfulStore.most = 0
    run_state_machine_as_test(TierMachine, settings=SETTINGS)
    for round in range(20):  # what is reached hangs on how far threads have come: go on until all is, often enough
        if all(TierMachine.reached.get(what, 0) >= 10 for what in EXPECTED):
            break
        again = settings(SETTINGS, derandomize=False, database=None)
        run_state_machine_as_test(seed(round)(TierMachine), settings=again)
    for what in EXPECTED:
        assert TierMachine.reached.get(what, 0) >= 10, f"{what} was hardly ever reached: {TierMachine.reached}"
    assert WatchfulStore.most > DISK * 0.8


def trusting_read(self: DiskTier, key: BlockKey, layout: BlockLayout, out: dict[str, Tensor]) -> None:
    """Serves damaged blocks."""
    try:
        sound_read(self, key, layout, out)
    except TierCorruptError:
        pass


def optimistic_write(self: DiskTier, key: BlockKey, layout: BlockLayout, tensors: dict[str, Tensor]) -> None:
    """Takes a failed write for a block that is there."""
    try:
        sound_write(self, key, layout, tensors)
    except TierError:
        self.ledger.reserve(self.size(key, layout))


sound_read, sound_write = DiskTier.read, DiskTier.write


class ForgetfulManager(TierManager):
    """Removes a block when its first owner lets go, although another one shares it."""

    def drop(self, owner: str, keys: object = None) -> None:
        super().drop(owner)
        for other in ("first", "second"):
            if other != owner:
                for block in list(self._mover.blocks.values()):
                    if len(block.owners) == 1 and block.key.generation % 2:
                        super().drop(other, [block.key])


@pytest.mark.parametrize("sabotage", ["trusting read", "optimistic write", "forgetful drop"])
def test_the_machine_notices_sabotage(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sabotaged(TierMachine):
        pass

    if sabotage == "trusting read":
        monkeypatch.setattr(DiskTier, "read", trusting_read)
    elif sabotage == "optimistic write":
        monkeypatch.setattr(DiskTier, "write", optimistic_write)
    else:
        Sabotaged.manager_class = ForgetfulManager
    with pytest.raises((AssertionError, TierError, ExceptionGroup)):
        run_state_machine_as_test(Sabotaged, settings=settings(SETTINGS, phases=["generate"]))
