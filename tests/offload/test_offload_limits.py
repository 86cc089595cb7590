"""A context whose keys and values exceed memory: limits hold at every step, and what goes wrong below is told."""

import errno
import threading

import pytest
import torch

from kvpress import PolicyCache
from kvpress.errors import CacheStateError, UnsupportedModelError
from kvpress.offload import (
    Offload,
    TierClosedError,
    TierCorruptError,
    TierError,
    TierFullError,
    TierLostError,
    TierReadError,
)
from kvpress.offload import attached as attachment
from kvpress.offload.manager import TierManager
from kvpress.policies import Full, Quest, SnapKV, TokenSelect
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.faulty_store import FaultyStore

LAYERS = 16
TOKENS = 128 * LAYERS  # bytes of the keys and values of one token
SELECTING = TokenSelect(top_k=24, sinks=2, local=16, chunk=16, tail=2, threshold=0.5)
INDEXED = TokenSelect(top_k=24, sinks=2, local=16, chunk=16, tail=2, threshold=0.5, index="int8")

QUEST = Quest(top_k=32, page_size=16, skip_layers=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2)


def decode(model, cache, ids, steps, after=lambda: None):
    """Logits of a prompt and of `steps` tokens that follow it, whatever the model would have said."""
    logits = []
    with torch.no_grad():
        for piece in ids.split([ids.shape[1] - steps, *[1] * steps], dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
            after()
    return logits


# in heads of 8 numbers an int8 index and positions, which stay near, take a quarter of the bytes of keys and values alone
@pytest.mark.parametrize(("policy", "dim"), [
    (Full(), 8), (SELECTING, 8), (INDEXED, 32), (QUEST, 8),
], ids=["full", "tokenselect", "tokenselect int8", "quest"])  # fmt: skip
def test_four_times_the_memory_limit(model, folder, bytes_in, policy, dim):
    if dim != 8:
        model = tiny_model(
            "llama", num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, head_dim=dim
        )
    ids, times = random_tokens(1, 240), 4
    full = 240 * TOKENS * dim // 8
    limit, disk_limit = full // times, full + 700 * 1024
    cache = PolicyCache(model, policy, offload=Offload(host=limit, disk=folder, disk_limit=disk_limit, block=8))
    seen = []

    def check():
        seen.append((cache.nbytes, bytes_in(folder)))
        host, disk = cache.report().tiers
        assert max(cache.nbytes, host.nbytes, host.peak_nbytes) <= limit
        assert max(seen[-1][1], disk.peak_nbytes) <= disk_limit
        assert cache.nbytes <= host.nbytes, "something near is not accounted for"

    logits = decode(model, cache, ids, 16, check)
    expected = decode(model, PolicyCache(model, policy), ids, 16)
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    assert cache.full_nbytes == full and full >= times * limit
    assert min(on_disk for _, on_disk in seen) > full // 2, "the disk tier was not needed"
    cache.close()


def test_no_limit_is_overrun_for_a_moment(model, folder, monkeypatch):
    """Counted are all tensors the offload makes, as they are made."""
    limit = 240 * TOKENS // 4
    cache = PolicyCache(model, "full", offload=Offload(host=limit, disk=folder, block=8))
    tier = cache.tiers.manager.near
    largest, take = [0], tier.ledger.reserve

    def reserve(nbytes):
        done = take(nbytes)
        largest[0] = max(largest[0], tier.ledger.statistics().bytes)
        return done

    monkeypatch.setattr(tier.ledger, "reserve", reserve)
    decode(model, cache, random_tokens(1, 240), 8)
    assert limit // 2 < largest[0] <= limit
    cache.close()


def test_a_limit_that_cannot_hold_one_layer_is_told(model, folder):
    cache = PolicyCache(model, "full", offload=Offload(host=24_000, disk=folder, block=4))
    with pytest.raises(TierFullError, match=r"host tier: has no room for \d+ bytes of working memory"):
        decode(model, cache, random_tokens(1, 240), 2)
    cache.reset()
    assert cache.report().tiers[0].nbytes <= 1_000
    assert cache.report().tiers[1].blocks == 0
    decode(model, cache, random_tokens(1, 6), 2)  # a short context fits
    cache.close()


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(monkeypatch):
    """Stores of the caches made from now on, whose system calls may fail."""
    stores = []

    def open_store(folder):
        stores.append(FaultyStore(folder))
        return stores[-1]

    monkeypatch.setattr(attachment, "make_manager", lambda options, device: TierManager(options, open_store=open_store))
    return stores


def right_or_error(model, cache, ids, steps, fault):
    """Decode with a fault after the prompt: the number of steps that were right, and the error that ended it, if one did."""
    expected = decode(model, PolicyCache(model, cache.policies.given), ids, steps)
    right = 0
    with torch.no_grad():
        for step, piece in enumerate(ids.split([ids.shape[1] - steps, *[1] * steps], dim=1)):
            try:
                logits = model(piece, past_key_values=cache).logits
            except TierError as error:
                with pytest.raises((CacheStateError, TierError)):
                    model(piece, past_key_values=cache)  # the broken cache gives no further token
                return right, error
            assert torch.equal(logits, expected[step]), "a wrong token"
            right += 1
            if step == 0:
                fault()
    return right, None


POLICIES = pytest.mark.parametrize(
    "policy", [Full(), SELECTING, INDEXED], ids=["full", "tokenselect", "tokenselect int8"]
)


@POLICIES
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_takes_no_more(model, folder, faulty, policy, code):
    """The tail of each layer grows near instead, as long as there is room; without room it is told."""
    ids = random_tokens(1, 90)
    for host, ends in ((150 * TOKENS, False), (46_000, True)):
        cache = PolicyCache(model, policy, offload=Offload(host=host, disk=folder, block=8))

        def full_disk():
            faulty[-1].errors["write"] = code

        right, error = right_or_error(model, cache, ids, 16, full_disk)
        assert cache.report().tiers[1].bytes_in > 0 or not ends
        assert isinstance(error, TierFullError) == ends and (right == 17) == (not ends)
        cache.close()
        assert not list(folder.iterdir())


@pytest.mark.parametrize("policy", [Full(), INDEXED], ids=["full", "tokenselect int8"])
@pytest.mark.parametrize(("fails", "code"), [
    ("open_temporary", errno.EIO), ("write", errno.ENOSPC), ("fsync", errno.ENOSPC), ("rename", errno.EIO), ("fsync_directory", errno.EIO),
])  # fmt: skip
def test_writes_that_fail_for_a_while_cost_nothing_but_time(model, folder, faulty, policy, fails, code):
    """Five in a row: the block is written again, or another layer's table moves down instead."""
    for host in (120 * TOKENS, None):
        cache = PolicyCache(model, policy, offload=Offload(host=host, disk=folder, block=4))

        def now_and_then():
            faulty[-1].errors[fails], faulty[-1].times[fails] = code, 5

        assert right_or_error(model, cache, random_tokens(1, 150), 8, now_and_then) == (9, None)
        assert faulty[-1].times[fails] == 0 and cache.report().tiers[-1].failures > 0
        cache.close()
        assert not list(folder.iterdir())


def test_a_table_that_cannot_move_down_stays_as_it_was(model, folder, faulty):
    cache = PolicyCache(model, "full", offload=Offload(host=240 * TOKENS, disk=folder, disk_limit="20KB", block=4))
    ids = random_tokens(1, 100)
    decode(model, cache, ids, 1)
    layer, blocks = cache.policy_layers[3], cache.report().tiers[1].blocks
    keys, held = layer.keys.clone(), layer.stowage.held
    faulty[-1].errors["write"] = errno.EIO
    near = cache.tiers.manager.near.ledger
    assert near.reserve(near.limit - near.statistics().bytes), "no room for a copy near either"
    with pytest.raises(TierFullError, match="disk could not be written"):
        layer.stowage.lower()
    assert torch.equal(layer.keys, keys) and layer.table.base == 0 and layer.stowage.blocks == []
    assert (cache.report().tiers[1].blocks, layer.stowage.held) == (blocks, held)
    cache.close()


@POLICIES
def test_a_flipped_byte_is_told(model, folder, policy):
    cache = PolicyCache(model, policy, offload=Offload(disk=folder, block=4))

    def flip():
        for path in folder.glob("*/*"):
            if path.name != "owner.json":
                data = bytearray(path.read_bytes())
                data[-1] ^= 16
                path.write_bytes(data)

    right, error = right_or_error(model, cache, random_tokens(1, 90), 10, flip)
    assert isinstance(error, TierCorruptError) and error.lost and right >= 1
    cache.close()


@POLICIES
def test_a_vanished_file_is_told(model, folder, policy):
    cache = PolicyCache(model, policy, offload=Offload(disk=folder, block=4))

    def remove():
        for path in folder.glob("*/*"):
            if path.name != "owner.json":
                path.unlink()

    right, error = right_or_error(model, cache, random_tokens(1, 90), 10, remove)
    assert isinstance(error, TierLostError) and error.lost and right >= 1
    cache.close()


def test_reading_that_fails_once_is_tried_again_and_always_is_told(model, folder, faulty):
    for times, kind in ((1, None), (10_000, TierReadError)):
        cache = PolicyCache(model, "full", offload=Offload(disk=folder, block=4))

        def fail(times=times):
            faulty[-1].errors["read"], faulty[-1].times["read"] = errno.EIO, times

        right, error = right_or_error(model, cache, random_tokens(1, 60), 6, fail)
        assert (right == 7) == (kind is None)
        assert error is None if kind is None else isinstance(error, kind)
        assert not getattr(error, "lost", False)
        cache.close()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_refusals(folder):
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="offload must be an Offload or None, got '2GB'"):
        PolicyCache(model, "full", offload="2GB")
    cache = PolicyCache(model, SnapKV(budget=8, window=4), offload=Offload(disk=folder))
    with pytest.raises(CacheStateError, match="offload must be None to take tokens back from policy 'snapkv'"):
        cache.activate_past_recording()
    cache.close()
    with pytest.raises(TierClosedError, match="the cache was closed"):
        model(random_tokens(1, 300), past_key_values=cache)
    assert not list(folder.iterdir())


def test_layers_that_share_keys_are_refused(folder, monkeypatch):
    from transformers.cache_utils import DummyLayer

    with pytest.raises(UnsupportedModelError, match="shares keys between layers"):
        attachment.attach([DummyLayer()], Offload(disk=folder), torch.device("cpu"))
    assert not list(folder.iterdir())


def test_threads_are_none_before_and_after(folder):
    before = threading.active_count()
    model = tiny_model("llama")
    cache = PolicyCache(model, "full", offload=Offload(disk=folder, block=4))
    decode(model, cache, random_tokens(1, 30), 3)
    assert threading.active_count() > before
    cache.close()
    assert threading.active_count() == before
