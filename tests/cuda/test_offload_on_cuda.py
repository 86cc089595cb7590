"""Offload from device memory to pinned host memory to disk: the logits of the same cache without offload, bit for bit.

Every case runs twice: on a CUDA device where there is one, and everywhere on a fake device whose copies lag behind the computation.
"""

import copy
import gc
import threading
from functools import cache

import psutil
import pytest
import torch

from kvpress import PolicyCache
from kvpress.offload import Offload, TierFullError
from kvpress.offload import attached as attachment
from kvpress.offload.manager import TierManager
from kvpress.offload.transfer import CudaDevice
from kvpress.policies import H2O, AdaKV, Full, Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect
from kvpress.testing.fake_device import LaggingCopies
from kvpress.testing.families import random_tokens, tiny_model

LAYERS, BLOCK, PROMPT, STEPS = 6, 8, 96, 8
VOTES = {"top_k": 12, "sinks": 2, "local": 16, "chunk": 16, "tail": 2, "threshold": 0.5}
NARROW = {
    "full": Full(),
    "tokenselect exact keep": TokenSelect(**VOTES, positions="keep"),
    "tokenselect exact reindex": TokenSelect(**VOTES),
    "tokenselect int8 keep": TokenSelect(**VOTES, positions="keep", index="int8"),
    "tokenselect int8 reindex": TokenSelect(**VOTES, index="int8"),
    "quest": Quest(top_k=16, page_size=8, skip_layers=1),
    "tidaldecode": TidalDecode(top_k=12, dense_layers=0),
}
EVICTING = {
    "streaming_llm": StreamingLLM(budget=60, sinks=2),
    "snapkv": SnapKV(budget=60, window=4),
    "h2o": H2O(budget=60),
    "adakv": AdaKV(budget=60, window=4),
}
DEVICES = [
    "fake",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


@cache
def model_on(name):
    model = tiny_model("llama", num_hidden_layers=LAYERS, hidden_size=64, head_dim=16)
    return model.to("cuda" if name == "cuda" else "cpu")


@pytest.fixture(params=DEVICES)
def model(request, monkeypatch):
    if request.param == "fake":
        monkeypatch.setattr(attachment, "make_manager", lambda options, device: TierManager(options, LaggingCopies()))
    return model_on(request.param)


def tokens(model, *shape, seed=0):
    return random_tokens(*shape, seed=seed).to(model.device)


def step(model, cache, ids, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def decode(model, cache, after=lambda: None):
    """Logits of a padded batch of two, a prompt in two pieces and `STEPS` tokens behind it, whatever the model would have said."""
    ids, mask = tokens(model, 2, PROMPT + STEPS), torch.ones(2, PROMPT + STEPS, dtype=torch.long, device=model.device)
    ids[1, :5], mask[1, :5] = 0, 0
    logits, seen = [], 0
    for piece in ids.split([PROMPT - 20, 20, *[1] * STEPS], dim=1):
        seen += piece.shape[1]
        logits.append(step(model, cache, piece, attention_mask=mask[:, :seen]))
        after()
    return logits


def unlike(logits, expected):
    assert len(logits) == len(expected) > 0
    return [number for number, pair in enumerate(zip(logits, expected, strict=True)) if not torch.equal(*pair)]


# Keys and values of two rows of 104 tokens in six layers take 320 KB; pinned buffers are rounded up to powers of two.
LIMITS = {
    "device": {"device": "4MB"},
    "device and host": {"device": 200_000, "host": "4MB"},
    "device and disk": {"device": 200_000},
    "device, host and disk": {"device": 200_000, "host": 64_000},
    "host and disk": {"host": 100_000},
    "disk": {},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", NARROW)
def test_the_logits_are_those_without_offload(model, folder, name, limits):
    given, policy = LIMITS[limits], NARROW[name]
    disk = {} if limits in ("device", "device and host") else {"disk": folder}
    offloaded = PolicyCache(model, policy, offload=Offload(block=BLOCK, **given, **disk))

    def check():
        for tier in offloaded.report().tiers:
            assert tier.limit is None or tier.peak_nbytes <= tier.limit
        if "device" in given:
            near = offloaded.report().tiers[0]
            assert sum(table_bytes(layer) for layer in offloaded.policy_layers) <= near.nbytes

    logits = decode(model, offloaded, check)
    assert unlike(logits, decode(model, PolicyCache(model, policy))) == []
    moved = {tier.tier: tier.bytes_in for tier in offloaded.report().tiers}
    lowest = list(moved)[-1]
    assert limits == "device" or moved[lowest] > 0, f"nothing was moved to {lowest}"
    offloaded.close()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", ["full", "tokenselect exact keep", "tokenselect int8 reindex", "quest"])
def test_packed_rows_give_the_same_logits(model, folder, name, kv_dtype):
    device = {"full": 70_000, "tokenselect int8 reindex": 130_000}.get(name, 100_000)
    policy, offload = NARROW[name], Offload(block=BLOCK, device=device, host=16_000, disk=folder)
    offloaded = PolicyCache(model, policy, kv_dtype=kv_dtype, offload=offload)
    assert unlike(decode(model, offloaded), decode(model, PolicyCache(model, policy, kv_dtype=kv_dtype))) == []
    assert offloaded.report().tiers[-1].bytes_in > 0
    offloaded.close()


def table_bytes(layer):
    return sum(
        tensor.untyped_storage().nbytes()
        for tensor in (layer.table.keys, layer.table.values, *layer.table.columns.values())
    )


@pytest.mark.parametrize("limits", ["device, host and disk", "disk"])
@pytest.mark.parametrize("name", EVICTING)
def test_an_evicting_policy_gives_the_same_logits(model, folder, name, limits):
    policy = EVICTING[name]
    near = {"device": 400_000} if "device" in LIMITS[limits] else {}  # six steady tables of 60 slots take 190 KB
    given = {**LIMITS[limits], **near, "disk": folder}
    offloaded, plain = PolicyCache(model, policy, offload=Offload(block=BLOCK, **given)), PolicyCache(model, policy)
    assert unlike(decode(model, offloaded), decode(model, plain)) == []
    assert offloaded.report().evictions == plain.report().evictions > 0
    offloaded.close()


@pytest.mark.parametrize("name", ["full", "tokenselect int8 keep", "quest"])
def test_rows_are_reordered_and_tokens_taken_back(model, folder, name):
    policy = NARROW[name]
    caches = [
        PolicyCache(model, policy),
        PolicyCache(model, policy, offload=Offload(block=BLOCK, device=200_000, host=64_000, disk=folder)),
    ]
    logits = [decode(model, each) for each in caches]
    for each in caches:
        each.batch_select_indices(torch.tensor([1, 0, 0]))
        each.crop(-13)
    more = tokens(model, 3, 1, seed=4)
    mask = torch.ones(3, PROMPT + STEPS - 13 + 1, dtype=torch.long, device=model.device)
    mask[0, :5] = 0
    for out, each in zip(logits, caches, strict=True):
        out.append(step(model, each, more, attention_mask=mask))
    assert unlike(*logits) == []
    caches[1].close()


def test_beams_and_copies(model, folder):
    ids = tokens(model, 1, PROMPT)
    found = []
    for offload in (None, Offload(block=BLOCK, device=260_000, host=64_000, disk=folder)):
        cache = PolicyCache(model, "full", offload=offload)
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=6, num_beams=3, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        cache.reset()
        step(model, cache, ids)
        second = copy.deepcopy(cache)
        after = [step(model, each, tokens(model, 1, 1, seed=seed)) for seed in (1, 2) for each in (cache, second)]
        found.append(([out.sequences, *out.scores, *after], cache, second))
    assert unlike(found[1][0], found[0][0]) == []
    assert found[1][1].report().tiers[-1].bytes_in > 0
    for cache in found[1][1:]:
        cache.close()
    assert not list(folder.iterdir())


def test_a_device_limit_below_one_layer_is_told(model, folder):
    cache = PolicyCache(model, "full", offload=Offload(block=BLOCK, device=12_000, disk=folder))
    with pytest.raises(TierFullError, match=r"device tier: has no room for \d+ bytes of working memory"):
        decode(model, cache)
    cache.close()


def test_nothing_is_left(model, folder):
    process, start = psutil.Process(), None
    policies = [NARROW["full"], NARROW["tokenselect int8 keep"], NARROW["quest"], EVICTING["snapkv"]]
    for number in range(8):
        offload = Offload(block=BLOCK, device=400_000 if number % 4 == 3 else 200_000, host=64_000, disk=folder)
        cache = PolicyCache(model, policies[number % 4], offload=offload)
        decode(model, cache)
        cache.close()
        del cache
        gc.collect()
        assert not list(folder.iterdir())
        now = [process.num_fds(), threading.active_count()]
        if model.device.type == "cuda":
            torch.cuda.synchronize()
            now.append(torch.cuda.memory_allocated())
        if number == 3:
            start = now
    assert all(a <= b for a, b in zip(now, start, strict=True)), f"{now} after, {start} at the start"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_blocks_travel_on_a_stream_of_their_own(folder, monkeypatch):
    """Copies of blocks are put on the side stream, which is not the one that computes, and memory holds to the limit."""
    model, streams = model_on("cuda"), []
    original = CudaDevice.side_copy

    def side_copy(self, target, source):
        streams.append((self._side.cuda_stream, self._compute.cuda_stream))
        original(self, target, source)

    monkeypatch.setattr(CudaDevice, "side_copy", side_copy)
    cache = PolicyCache(model, "full", offload=Offload(block=BLOCK, device=200_000, host=64_000, disk=folder))
    decode(model, cache)
    assert streams and all(side != compute for side, compute in streams)
    before = torch.cuda.memory_allocated()
    near = cache.report().tiers[0].nbytes
    cache.close()
    torch.cuda.synchronize()
    freed = before - torch.cuda.memory_allocated()
    assert 0 < freed <= near + 512 * 200, (
        "device memory that nobody accounted for"
    )  # each small tensor is rounded to 512
