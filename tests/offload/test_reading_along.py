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
from kvpress.offload.manager import TierManager
from kvpress.offload.slot_rows import RowsWanted

BLOCKS, SLOTS = 12, 16

pytestmark = pytest.mark.skipif(extension is None, reason="the native kernels are not built")


@pytest.fixture
def stored(folder, monkeypatch, put_rows):
    """A manager with blocks of slot rows on disk, their source, and all rows `[blocks, slots, width]`."""
    monkeypatch.setattr(module, "WORTH_HELP", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TierManager(Offload(disk=folder)) as manager:
        source, written = put_rows(manager, BLOCKS, SLOTS)
        yield manager, source, written
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
    source.look_up(manager._mover.blocks, manager._mover.version)

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


@pytest.mark.parametrize("together", [0.05, 0.4, 0.9, 1.0])
def test_rows_with_gaps_of_every_size_come_to_their_places(folder, put_rows, together):
    """Small gaps are read with the rows around them; rows of 2 KB, so that some gaps are larger than what is read for nothing."""
    slots, gaps, longest = 700, set(), 0
    with TierManager(Offload(disk=folder)) as manager:
        source, written = put_rows(manager, 1, slots, dim=128)
        payload = source.layout.payload
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            numbers = (torch.rand(slots, generator=generator) < together).nonzero().view(-1)
            out = torch.zeros(slots + 1, payload, dtype=torch.uint8)
            places = torch.randperm(slots, generator=generator)[: len(numbers)]
            manager.read_rows(
                source, RowsWanted(torch.tensor([0]), torch.tensor([0, len(numbers)]), numbers, places), out
            )
            expected = torch.zeros_like(out)
            expected[places] = written[0, numbers, :payload]
            assert torch.equal(out, expected)
            gaps.update((numbers.diff() - 1).tolist())
            longest = max(longest, len(numbers))
    assert gaps == {0} if together == 1 else {0, 1, 2} <= gaps
    assert max(gaps) > 8 or together > 0.05
    assert longest > 256 or together < 0.5  # more than fit in one call


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
