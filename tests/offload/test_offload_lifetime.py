"""Copies, threads, and what is left when caches go."""

import copy
import gc
import os
import threading
import weakref

import psutil
import pytest
import torch

from kvpress import PolicyCache
from kvpress.offload import Offload, TierClosedError
from kvpress.policies import Full, Quest, SnapKV, TokenSelect
from kvpress.testing.families import random_tokens, tiny_model

GENERATIONS = 1_000 if os.environ.get("KVPRESS_TEST_EVERYTHING") == "1" else 60
SELECTING = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.5)
INDEXED = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=0.5, index="int8")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def step(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("policy", [Full(), SELECTING, INDEXED], ids=["full", "tokenselect", "tokenselect int8"])
@pytest.mark.parametrize("host", [None, 44_000])
def test_copies_share_blocks_and_go_their_own_ways(model, folder, policy, host):
    ids = random_tokens(1, 40)
    plain, first = (
        PolicyCache(model, policy),
        PolicyCache(model, policy, offload=Offload(host=host, disk=folder, block=4)),
    )
    for cache in (plain, first):
        step(model, cache, ids)
    if host is not None:
        for stowage in first.tiers._living():
            first.tiers.lower(stowage)
    blocks = sum(tier.blocks for tier in first.report().tiers)
    assert blocks >= 10
    second, other = copy.deepcopy(first), copy.deepcopy(plain)
    assert sum(tier.blocks for tier in first.report().tiers) == blocks, "a copy wrote the blocks again"
    assert second.tiers.name != first.tiers.name
    for seed in range(6):
        a, b = random_tokens(1, 1, seed=seed), random_tokens(1, 2, seed=seed + 50)
        assert torch.equal(step(model, first, a), step(model, plain, a))
        assert torch.equal(step(model, second, b), step(model, other, b))
    first.close()
    a = random_tokens(1, 1, seed=99)
    assert torch.equal(step(model, second, a), step(model, other, a)), "the original took blocks with it"
    with pytest.raises(TierClosedError):
        step(model, first, ids)
    third = copy.deepcopy(second)
    del second, cache
    gc.collect()
    assert torch.equal(step(model, third, a), step(model, copy.deepcopy(other), a))
    del third
    gc.collect()
    assert not list(folder.iterdir())


def test_two_threads_with_copies_of_one_cache(model, folder):
    """Both share one manager."""
    ids = random_tokens(1, 60)
    caches = [PolicyCache(model, SELECTING, offload=Offload(disk=folder, block=4))]
    step(model, caches[0], ids)
    caches.append(copy.deepcopy(caches[0]))
    texts = [random_tokens(1, 24, seed=seed) for seed in (1, 2)]
    got, errors = {}, []

    def work(number):
        try:
            pieces = texts[number].split(1, dim=1)
            got[number] = torch.cat([step(model, caches[number], piece) for piece in pieces], dim=1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, text in enumerate(texts):
        plain = PolicyCache(model, SELECTING)
        step(model, plain, ids)
        expected = torch.cat([step(model, plain, piece) for piece in text.split(1, dim=1)], dim=1)
        assert torch.equal(got[number], expected)
    disk = caches[0].report().tiers[-1]
    assert disk.bytes_in > 0 and disk.bytes_out > 0
    for cache in caches:
        cache.close()
    assert not list(folder.iterdir())


# with KVPRESS_TEST_EVERYTHING=1 a thousand generations, else sixty
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["close", "delete", "reset"])
def test_nothing_is_left_over_many_generations(model, folder, way):
    policies = [Full(), SELECTING, Quest(top_k=8, page_size=4, skip_layers=1), SnapKV(budget=18, window=4), INDEXED]
    process, ids = psutil.Process(), random_tokens(1, 24)
    kept = PolicyCache(model, "full", offload=Offload(host=26_000, disk=folder, block=4)) if way == "reset" else None
    start, below = None, 0
    for number in range(GENERATIONS // 3 + 2):
        policy = policies[number % 5]
        cache = kept or PolicyCache(
            model, policy, offload=Offload(disk=folder, block=4, host=None if number % 2 else "60KB")
        )
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
        if kept is not None:
            kept.tiers.lower(kept.policy_layers[0].stowage)
        below += cache.report().tiers[-1].bytes_in
        reference, manager = weakref.ref(cache), cache.tiers.manager
        if way == "close":
            cache.close()
        elif way == "reset":
            cache.reset()
            assert sum(tier.blocks for tier in cache.report().tiers) == 0
        del cache
        if kept is None:
            assert reference() is None, "a cache lives on in a cycle"
            assert not list(folder.iterdir())
            assert manager.near is None or manager.near.ledger.statistics().bytes == 0, "bytes are left in the account"
        del manager
        now = (process.num_fds(), threading.active_count())
        if number == 4:
            start = now
    assert now[0] <= start[0] and now[1] == start[1], "file descriptors or threads are left"
    assert below > 0 or way == "reset"
    if kept is not None:
        assert kept.report().tiers[0].nbytes <= 2_000
        kept.close()
        assert not list(folder.iterdir())


def test_an_exception_in_the_middle_leaves_nothing(model, folder, monkeypatch):
    cache = PolicyCache(model, "full", offload=Offload(disk=folder, block=4))
    step(model, cache, random_tokens(1, 30))
    layer = model.model.layers[1].mlp

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        step(model, cache, random_tokens(1, 1))
    monkeypatch.undo()
    cache.reset()
    plain = PolicyCache(model, "full")
    for piece in random_tokens(1, 20, seed=7).split([18, 1, 1], dim=1):
        assert torch.equal(step(model, cache, piece), step(model, plain, piece))
    assert cache.report().tiers[0].blocks == 2 * 5
    del cache
    gc.collect()
    assert not list(folder.iterdir())


def test_the_report_names_the_tiers(model, folder):
    cache = PolicyCache(model, "full", offload=Offload(host="60KB", disk=folder, disk_limit="1MB", block=4))
    step(model, cache, random_tokens(1, 100))
    for _ in range(2):
        step(model, cache, random_tokens(1, 1))
    report = cache.report()
    host, disk = report.to_dict()["tiers"]
    assert (host["tier"], host["limit"], disk["tier"], disk["limit"]) == ("host", 60_000, "disk", 1_000_000)
    assert host["nbytes"] >= report.nbytes > 0
    assert "stall" in str(report) and "host" in str(report)
    assert PolicyCache(model, "full").report().tiers == ()
    cache.close()
    assert cache.report().tiers == ()
