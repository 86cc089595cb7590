"""Slot rows: single slots of a block are what was written, or an error; never anything else."""

import errno
import random

import pytest
import torch

from kvpress import PolicyCache
from kvpress.kernels.native import extension
from kvpress.offload import Offload, TierCorruptError, TierLostError, TierReadError
from kvpress.offload import slot_rows as module
from kvpress.offload import store as store_module
from kvpress.offload.key import BlockKey
from kvpress.offload.manager import TierManager
from kvpress.offload.row_source import RowSource
from kvpress.offload.slot_rows import NAME, RowLayout, RowsWanted, runs
from kvpress.offload.stored_slots import StoredSlots
from kvpress.offload.working import StoredBlock
from kvpress.policies import Quest, TokenSelect
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.faulty_store import FaultyStore

BATCH, HEADS, SLOTS = 2, 3, 8
SELECTING = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=2, index="int8")


def block(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(BATCH, HEADS, SLOTS, 5, generator=generator).to(dtype)
    values = torch.randn(BATCH, HEADS, SLOTS, 7, generator=generator).to(dtype)
    return {"key": keys, "value": values}


def packed(tensors, together, key):
    layout = RowLayout.of(tensors, SLOTS, together=together)
    rows = torch.empty(layout.shape(BATCH), dtype=torch.uint8)
    layout.pack(tensors, rows, key)
    return layout, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("together", [True, False])
def test_packed_rows_hold_the_tensors_bit_for_bit(dtype, together):
    tensors, key = block(dtype), BlockKey("c", 0, 0)
    layout, rows = packed(tensors, together, key)
    assert layout.width % 8 == 0 and layout.groups == (1 if together else HEADS)
    for name, tensor in layout.unpack(rows).items():
        assert torch.equal(tensor, tensors[name])
    flat = rows.view(-1, layout.width)
    for batch, head, slot in [(0, 0, 0), (1, 2, 5), (1, 0, 7)]:
        row = flat[layout.number(batch, 0 if together else head, slot)].expand(1, layout.groups, 1, -1)
        for name, part in layout.unpack(row).items():
            assert torch.equal(part[0, head, 0], tensors[name][batch, head, slot])
    numbers = range(len(flat))
    assert layout.first_damaged(module.memory_of(rows), numbers, numbers, key) is None
    assert layout.first_damaged(module.memory_of(rows), numbers, numbers, BlockKey("c", 0, 1)) == 0, "of another block"
    assert layout.first_damaged(module.memory_of(rows.roll(1, dims=2)), numbers, numbers, key) == 0, "in another place"


def test_runs():
    assert runs([]) == []
    assert runs([4]) == [(4, 1)]
    assert runs([1, 2, 3, 7, 8, 2, 0, 1]) == [(1, 3), (7, 2), (2, 1), (0, 2)]


@pytest.fixture(params=["disk", "host"])
def stored(request, folder):
    """A manager that holds three blocks of rows in the tier."""
    stores = []

    def open_store(path):
        stores.append(FaultyStore(path))
        return stores[-1]

    host = None if request.param == "disk" else 1 << 20
    with TierManager(Offload(disk=folder, host=host), open_store=open_store) as manager:
        keys = [BlockKey("c", 0, number) for number in range(3)]
        written = []
        for number, key in enumerate(keys):
            layout, rows = packed(block(seed=number), True, key)
            manager.put(key, {NAME: rows}, "me")
            written.append(rows.view(-1, layout.width))
        assert manager.tiers_of(keys[0]) == [request.param]
        yield manager, keys, layout, written, stores[0]


def read(manager, wanted, layout, out):
    """`wanted` names the rows of each block."""
    source = RowSource(layout)
    source.follow([StoredBlock((((NAME,), key),), BATCH, layout=layout) for key, _ in wanted])
    manager.read_rows(source, RowsWanted.of([numbers for _, numbers in wanted]), out)


@pytest.fixture(params=["native", "python"], autouse=True)
def how(request, monkeypatch):
    """Files are read by the native kernels, or without them."""
    if request.param == "python":
        monkeypatch.setattr("kvpress.offload.store.extension", None)
    else:
        assert extension is not None


def test_rows_come_in_the_order_asked_for(stored):
    manager, keys, layout, written, store = stored
    wanted = [(keys[2], [3, 4, 5, 15]), (keys[0], [0]), (keys[1], [7, 2, 9])]
    out = torch.zeros(8, layout.payload, dtype=torch.uint8)
    read(manager, wanted, layout, out)
    expected = [written[2][[3, 4, 5, 15]], written[0][[0]], written[1][[7, 2, 9]]]
    assert torch.equal(out, torch.cat(expected)[:, : layout.payload])
    looked_at = store_module.extension is None and manager.tiers_of(keys[0]) == ["disk"]
    assert store.calls["open"] == (3 if looked_at else 0), "the native kernels read nothing"
    before = manager.statistics()
    read(manager, [(keys[0], [1])], layout, out[:1])
    tier = next(iter(before))
    assert manager.statistics()[tier].hits == before[tier].hits + 1
    assert manager._mover.moving == 0 and not any(each.pins for each in manager._mover.blocks.values())


def test_a_block_that_is_not_held_is_told(stored):
    manager, keys, layout, _, _ = stored
    manager.drop("me", [keys[1]])
    with pytest.raises(TierLostError, match="is not held"):
        read(manager, [(keys[0], [1]), (keys[1], [1])], layout, torch.empty(2, layout.payload, dtype=torch.uint8))
    assert not any(each.pins for each in manager._mover.blocks.values())


def test_every_damage_to_a_row_is_caught_and_other_rows_are_served(folder):
    """Flips and cuts of a file; rows that were not hit come out right or not at all: a file that is kept open is not measured again."""
    generator, caught, served = random.Random(0), 0, 0
    tensors = block()
    for case in range(2500):
        with TierManager(Offload(disk=folder)) as manager:
            key = BlockKey("c", 0, case)
            layout, rows = packed(tensors, True, key)
            manager.put(key, {NAME: rows}, "me")
            (path,) = [path for path in folder.glob("*/*") if path.name == key.digest]
            whole = path.read_bytes()
            header = len(whole) - rows.nbytes
            for _ in range(10):
                data = bytearray(whole)
                at = generator.randrange(len(data))
                if generator.random() < 0.2:
                    data = data[:at]
                else:
                    data[at] ^= 1 << generator.randrange(8)
                numbers = sorted(generator.sample(range(BATCH * SLOTS), 6))
                cut = len(data) < len(whole)
                hit = (
                    header + (numbers[-1] + 1) * layout.width > len(data)
                    if cut
                    else (at - header) // layout.width in numbers
                )
                out = torch.empty(6, layout.payload, dtype=torch.uint8)
                path.write_bytes(data)
                try:
                    read(manager, [(key, numbers)], layout, out)
                except TierCorruptError as error:
                    assert (hit or cut) and error.lost
                    caught += 1
                    break  # it is withdrawn
                assert not hit and torch.equal(out, rows.view(-1, layout.width)[numbers, : layout.payload])
                served += 1
            if key not in manager:
                with pytest.raises(TierLostError):
                    read(manager, [(key, numbers)], layout, out)
    assert caught > 1_000 and served > 1_000 and caught + served >= 5_000  # twice: natively and in Python


def test_faults_of_the_disk(stored):
    manager, keys, layout, written, store = stored
    if manager.tiers_of(keys[0]) != ["disk"]:
        return
    out = torch.empty(1, layout.payload, dtype=torch.uint8)
    store.errors["read"], store.times["read"] = errno.EIO, 1
    read(manager, [(keys[0], [4])], layout, out)  # tried again
    assert torch.equal(out[0], written[0][4][: layout.payload]) and store.times["read"] == 0
    store.times["read"] = 3
    with pytest.raises(TierReadError):
        read(manager, [(keys[0], [4])], layout, out)
    store.times["read"] = 0
    read(manager, [(keys[0], [4])], layout, out)  # it is kept
    store.unlink(keys[1].digest)
    with pytest.raises(TierLostError, match="vanished"):
        read(manager, [(keys[1], [4])], layout, out)
    assert keys[1] not in manager


def test_the_checksum_of_rows_matters(monkeypatch, folder):
    monkeypatch.setattr(RowLayout, "first_damaged", lambda *_: None)
    with pytest.raises(AssertionError):
        test_every_damage_to_a_row_is_caught_and_other_rows_are_served(folder)


# -- in a cache --------------------------------------------------------------------------------------------------------


def rows_read(monkeypatch, policy, folder):
    """Logits with and without offload, rows read by decoded tokens, and whole blocks read by them."""
    model, ids = tiny_model("llama"), random_tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    counts = {"rows": 0, "blocks": 0}
    read_rows, read_into = TierManager.read_rows, TierManager.read_into

    def count_rows(self, source, wanted, out):
        counts["rows"] += wanted.rows
        return read_rows(self, source, wanted, out)

    def count_blocks(self, key, out):
        counts["blocks"] += 1
        return read_into(self, key, out)

    caches = [PolicyCache(model, policy, offload=offload) for offload in (None, Offload(disk=folder, block=4))]
    same = 0
    for first, last in [(0, 44), *((step, step + 1) for step in range(44, 60))]:
        if first == 46:  # the index is built, page bounds too
            monkeypatch.setattr(TierManager, "read_rows", count_rows)
            monkeypatch.setattr(TierManager, "read_into", count_blocks)
        with torch.no_grad():
            logits = [
                model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=each).logits for each in caches
            ]
        same += torch.equal(*logits)
        if first == 50:
            for cache in caches:
                cache.reorder_cache(torch.tensor([1, 1]))
            mask = mask[[1, 1]]
    monkeypatch.undo()
    caches[1].close()
    return same, counts


@pytest.mark.parametrize(
    "policy", [SELECTING, Quest(top_k=8, page_size=4, skip_layers=0)], ids=["tokenselect", "quest"]
)
def test_decoded_tokens_read_selected_rows_only(monkeypatch, folder, policy):
    same, counts = rows_read(monkeypatch, policy, folder)
    assert same == 17
    # the page that grows may begin in the last block of its layer
    assert counts["rows"] > 20 and counts["blocks"] <= (2 * 14 if isinstance(policy, Quest) else 0)


def test_a_row_in_the_wrong_place_is_noticed(monkeypatch, folder):
    bring = StoredSlots._bring_rows

    def elsewhere(self, rows, index, places, entries):
        wrong = places.clone()
        wrong.view(-1)[entries] = places.view(-1)[entries.flip(0)]
        bring(self, rows, index, wrong, entries)

    monkeypatch.setattr(StoredSlots, "_bring_rows", elsewhere)
    keep = monkeypatch.undo
    monkeypatch.undo = lambda: None
    same, _ = rows_read(monkeypatch, SELECTING, folder)
    keep()
    assert same < 17
