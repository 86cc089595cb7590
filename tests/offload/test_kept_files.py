"""Files of blocks whose rows are read again and again are kept open: not too many, and no longer than the block lies on disk."""

import copy
import os
import resource
import threading
from pathlib import Path

import pytest
import torch

from kvpress import PolicyCache
from kvpress.kernels.native import extension
from kvpress.offload import Offload, TierCorruptError, TierLostError
from kvpress.offload.manager import TierManager
from kvpress.offload.slot_rows import RowsWanted
from kvpress.policies import TokenSelect
from kvpress.testing.families import random_tokens, tiny_model

LEAST = 1024  # numbers below are left to others
DESCRIPTORS = Path("/proc/self/fd")

pytestmark = pytest.mark.skipif(
    extension is None or not DESCRIPTORS.exists() or resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * LEAST,
    reason="no native kernels, no /proc, or too few descriptors to keep any",
)


def kept():
    """Numbers of the block files that this process has open between two calls, and their names."""
    found = {}
    for entry in DESCRIPTORS.iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # the descriptor of this very listing
            continue
        name = Path(target).name.removesuffix(" (deleted)")
        if len(name) == 64:
            found[int(entry.name)] = target
    return found


def read(manager, source, blocks, slots=4):
    wanted = RowsWanted.of([range(slots) if number in blocks else [] for number in range(len(source.keys))])
    wanted = wanted.some(sorted(blocks))
    wanted.places = torch.arange(len(wanted.numbers))
    out = torch.zeros(len(wanted.numbers), source.layout.payload, dtype=torch.uint8)
    manager.read_rows(source, wanted, out)
    return out


def test_a_file_is_kept_open_until_its_block_goes(folder, put_rows):
    with TierManager(Offload(disk=folder)) as manager:
        source, written = put_rows(manager, 6, 8)
        expected = written[:, :4, : source.layout.payload]
        assert not kept()
        assert torch.equal(read(manager, source, {1, 2, 4}), expected[[1, 2, 4]].flatten(0, 1))
        first = kept()
        assert len(first) == 3 and min(first) >= LEAST
        assert torch.equal(read(manager, source, {0, 1, 2}), expected[:3].flatten(0, 1))
        assert len(kept()) == 4 and first.items() <= kept().items(), "no file is opened twice"
        manager.drop("me", [source.keys[2]])
        assert len(kept()) == 3 and not any(source.keys[2].digest in each for each in kept().values())
        (path,) = [path for path in folder.glob("*/*") if path.name == source.keys[1].digest]
        data = bytearray(path.read_bytes())
        data[int(source.starts[1])] ^= 1
        path.write_bytes(data)
        with pytest.raises(TierCorruptError):
            read(manager, source, {0, 1})
        assert len(kept()) == 2 and torch.equal(read(manager, source, {0, 3}), expected[[0, 3]].flatten(0, 1))
        assert len(kept()) == 3
    assert not kept()


def test_a_file_cut_while_it_is_open_gives_no_wrong_rows(folder, put_rows):
    with TierManager(Offload(disk=folder)) as manager:
        source, _ = put_rows(manager, 2, 8)
        read(manager, source, {0, 1})
        (path,) = [path for path in folder.glob("*/*") if path.name == source.keys[1].digest]
        os.truncate(path, int(source.starts[1]) + 3 * source.layout.width)
        with pytest.raises(TierCorruptError):
            read(manager, source, {0, 1})
        assert len(kept()) == 1 and source.keys[1] not in manager


def test_threads_that_read_the_same_files_keep_each_once(folder, put_rows):
    with TierManager(Offload(disk=folder)) as manager:
        source, written = put_rows(manager, 40, 8)
        expected, gate, found = written[:, :4, : source.layout.payload].flatten(0, 1), threading.Barrier(4), []

        def work():
            gate.wait()
            found.append(read(manager, source, set(range(40))))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(found) == 4 and all(torch.equal(each, expected) for each in found)
        assert len(kept()) == 40
    assert not kept()


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_given_up_while_its_rows_are_read_goes_afterwards(folder, put_rows, fails):
    with TierManager(Offload(disk=folder)) as manager:
        source, written = put_rows(manager, 6, 8)
        expected = written[:, :4, : source.layout.payload]
        read(manager, source, {1, 2})
        store, seen = manager._mover.disk.store, []
        step = store.step

        def drops(name, *given, **options):
            if name == "read" and not seen:
                manager.drop("me", [source.keys[number] for number in (2, 3, 5)])
                seen.extend(list(folder.glob("*/" + source.keys[number].digest)) for number in (2, 3, 5))
                if fails:
                    raise KeyboardInterrupt
            return step(name, *given, **options)

        store.step = drops
        if fails:
            with pytest.raises(KeyboardInterrupt):
                read(manager, source, {1, 2, 3})
        else:
            assert torch.equal(read(manager, source, {1, 2, 3}), expected[1:4].flatten(0, 1))
        assert len(seen) == 3 and all(seen), "nothing went while rows were read"
        for number in range(6):
            assert (source.keys[number] in manager) == (number in (0, 1, 4))
            assert len(list(folder.glob("*/" + source.keys[number].digest))) == (number in (0, 1, 4))
        assert len(kept()) == 1 and manager._mover.reading == manager._mover.moving == 0
        with pytest.raises(TierLostError):
            read(manager, source, {1, 3})
        assert torch.equal(read(manager, source, {0, 1, 4}), expected[[0, 1, 4]].flatten(0, 1))
    assert not kept()


@pytest.mark.parametrize(("limit", "most"), [(LEAST, 0), (LEAST + 10, 10), (LEAST + 400, 40)])
def test_the_limit_of_the_process_is_kept(folder, put_rows, in_child, limit, most):
    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with TierManager(Offload(disk=folder)) as manager:
            source, written = put_rows(manager, 40, 8)
            for _ in range(3):
                assert torch.equal(
                    read(manager, source, set(range(40))), written[:, :4, : source.layout.payload].flatten(0, 1)
                )
            return len(kept())

    ended, text = in_child(work)
    assert (ended, text) == (0, str(most))


def test_a_cache_lets_its_files_go(folder):
    model, ids = tiny_model("llama"), random_tokens(1, 90)
    policy = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=2, index="int8")
    caches = [PolicyCache(model, policy, offload=Offload(disk=folder, block=4))]

    def go_on(cache, first, last):
        with torch.no_grad():
            model(ids[:, first : first + 40], past_key_values=cache)
            for step in range(first + 40, last):
                model(ids[:, step : step + 1], past_key_values=cache)

    go_on(caches[0], 0, 70)
    assert kept()
    caches.append(copy.deepcopy(caches[0]))
    caches[0].crop(-30)
    gone = [target for target in kept().values() if target.endswith("(deleted)")]
    assert kept() and not gone, "the copy relies on all blocks"
    caches[1].crop(-40)
    gone = [target for target in kept().values() if target.endswith("(deleted)")]
    assert kept() and not gone
    caches[0].reset()
    caches[1].close()
    assert not kept()
    go_on(caches[0], 0, 60)
    assert kept()
    caches.clear()
    assert not kept()
