"""A second thread that reads rows along: every row is read once and in place, whoever reads it, and help that does not pay pauses."""

import threading
from concurrent.futures import Future
from itertools import pairwise

import pytest
import torch

from kvpress.kernels.native import extension
from kvpress.offload import Offload
from kvpress.offload import store as module
from kvpress.offload.errors import TierCorruptError
from kvpress.offload.help import LONGEST, Help
from kvpress.offload.key import BlockKey
from kvpress.offload.manager import TierManager
from kvpress.offload.row_source import RowSource
from kvpress.offload.slot_rows import NAME, RowLayout, RowsWanted
from kvpress.offload.working import StoredBlock

BLOCKS, SLOTS = 12, 16

pytestmark = pytest.mark.skipif(extension is None, reason="the native kernels are not built")


@pytest.fixture
def stored(folder, monkeypatch):
    """A manager with blocks of slot rows on disk, their source, and all rows `[blocks, slots, width]`."""
    monkeypatch.setattr(module, "WORTH_HELP", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TierManager(Offload(disk=folder)) as manager:
        blocks, written = [], []
        for number in range(BLOCKS):
            key, generator = BlockKey("c", 0, number), torch.Generator().manual_seed(number)
            tensors = {name: torch.randn(1, 2, SLOTS, 8, generator=generator) for name in ("key", "value")}
            layout = RowLayout.of(tensors, SLOTS, together=True)
            rows = torch.empty(layout.shape(1), dtype=torch.uint8)
            layout.pack(tensors, rows, key)
            manager.put(key, {NAME: rows}, "me")
            blocks.append(StoredBlock((((NAME,), key),), 1, layout=layout))
            written.append(rows[0, 0])
        source = RowSource(layout)
        source.follow(blocks)
        yield manager, source, torch.stack(written)
    torch.set_num_threads(threads)


def all_rows(places):
    """Every other row of every block."""
    numbers = torch.arange(0, SLOTS, 2).repeat(BLOCKS)
    return RowsWanted(torch.arange(BLOCKS), torch.arange(BLOCKS + 1) * (SLOTS // 2), numbers, places)


def test_two_threads_read_every_row_to_its_place(stored):
    manager, source, written = stored
    store, expected = manager._mover.disk.store, written[:, ::2].flatten(0, 1)[:, : source.layout.payload]
    readers, step = set(), store.step
    store.step = lambda *given: (readers.add(threading.current_thread().name), step(*given))[1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        store._help = Help()
        places = torch.randperm(len(expected), generator=generator)
        out = torch.zeros(len(expected) + 1, source.layout.payload, dtype=torch.uint8)
        manager.read_rows(source, all_rows(places), out)
        assert torch.equal(out[places], expected) and not out[-1].any()
    assert len(readers) > 1, "a thread of the pool came in time"


@pytest.mark.parametrize("comes", ["late", "never", "first"])
def test_help_that_comes_late_or_never_changes_nothing(stored, comes):
    manager, source, written = stored
    expected, places = written[:, ::2].flatten(0, 1)[:, : source.layout.payload], torch.arange(BLOCKS * SLOTS // 2)
    out = torch.zeros(len(expected), source.layout.payload, dtype=torch.uint8)
    kept, future = [], Future()

    def beside(work):
        kept.append(work)
        if comes == "first":
            work()
        elif comes == "late":
            future.set_running_or_notify_cancel()
        return future

    done = manager._mover.disk.store.read_rows(source, all_rows(places), 0, out, beside)
    assert done == BLOCKS and torch.equal(out, expected) and len(kept) == 1
    out.zero_()
    kept[0]()
    assert not out.any(), "nothing is written once the caller has gone on"


def test_a_damaged_file_is_found_whoever_reads_it(stored, folder):
    manager, source, _ = stored
    victim = source.keys[7]
    (path,) = [path for path in folder.glob("*/*") if path.name == victim.digest]
    data = bytearray(path.read_bytes())
    data[int(source.starts[7])] ^= 1
    path.write_bytes(data)
    out = torch.zeros(BLOCKS * SLOTS // 2, source.layout.payload, dtype=torch.uint8)
    with pytest.raises(TierCorruptError) as caught:
        manager.read_rows(source, all_rows(torch.arange(len(out))), out)
    assert caught.value.lost and victim not in manager and source.keys[6] in manager
    assert manager._mover.moving == 0 and not any(each.pins for each in manager._mover.blocks.values())


def test_help_pauses_for_longer_and_longer_while_it_does_not_pay():
    help, tries = Help(), []
    for reading in range(400):
        if help.is_wanted():
            tries.append(reading)
            help.judge(60, 50, 1.0, 3.0)  # alone it would have taken 1.2
    pauses = [after - before - 1 for before, after in pairwise(tries)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 64] and max(pauses) == LONGEST
    while not help.is_wanted():
        pass
    help.judge(60, 30, 0.5, 0.1)
    assert help.is_wanted()
    help.judge(60, 60, 1.0, 0.1)  # it came too late, which may have been chance
    assert help.is_wanted()
