"""The account of the near tier counts every tensor that can be reached from a cache, found by a walk that knows nothing of the cache."""

import gc
import time
import types

import pytest
import torch

from kvpress import PolicyCache
from kvpress.offload import Offload, stowage
from kvpress.offload.manager import TierManager
from kvpress.policies import H2O, AdaKV, Full, Quest, SnapKV, TidalDecode, TokenSelect
from kvpress.rope import Rotation
from kvpress.testing.families import random_tokens, tiny_model

LAYERS, PROMPT, STEPS = 8, 200, 8
VOTES = {"top_k": 24, "sinks": 2, "local": 16, "chunk": 16, "tail": 2}
TOKENS = LAYERS * 2 * 2 * 16 * 4  # bytes of the keys and values of one token
POLICIES = {
    "full": Full(),
    "tokenselect": TokenSelect(**VOTES, threshold=0.5),
    "tokenselect int8": TokenSelect(**VOTES, threshold=2, index="int8"),
    "tokenselect int4": TokenSelect(**VOTES, threshold=2, index="int4"),
    "tokenselect keep": TokenSelect(**VOTES, positions="keep", threshold=2),
    "quest": Quest(top_k=32, page_size=16, skip_layers=1),
    "tidaldecode": TidalDecode(top_k=24, dense_layers=0),
    "snapkv": SnapKV(budget=40, window=8),
    "h2o": H2O(budget=40),
    "adakv": AdaKV(budget=40, window=8),
    "h2o and quest": [H2O(budget=60), Quest(top_k=32, page_size=16, skip_layers=0)],
}
# the model's, or tables of cosines that do not grow with the context; code
ENDS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.nn.Module, Rotation)


def storages(root):
    """Bytes of every tensor's storage that can be reached from `root`, by address."""
    seen, queue, found = set(), [root], {}
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, ENDS):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if item.device.type != "meta":
                found[storage.data_ptr()] = storage.nbytes()
            continue
        queue.extend(gc.get_referents(item))
    return found


@pytest.fixture(scope="module")
def model():
    return tiny_model(
        "llama", num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, hidden_size=32, head_dim=16
    )


def differences(model, folder, policy, kv_dtype=None, share=2.5):
    """What the account has more than the walk finds, after each forward of a prompt in two pieces and some tokens."""
    limit = int(PROMPT * TOKENS / share) // (1 if kv_dtype is None else 2)
    cache = PolicyCache(model, policy, kv_dtype=kv_dtype, offload=Offload(host=limit, disk=folder, block=8))
    found = []
    with torch.no_grad():
        for piece in random_tokens(1, PROMPT + STEPS).split([PROMPT - 50, 50, *[1] * STEPS], dim=1):
            model(piece, past_key_values=cache)
            account = cache.tiers.manager.near.ledger.statistics()
            assert account.peak_bytes <= limit
            found.append(account.bytes - sum(storages(cache).values()) - cache.tiers._aside)
    below = cache.report().tiers[1].bytes_in
    cache.close()
    return found, below


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_tensor_is_counted(model, folder, name, kv_dtype):
    evicts = name in ("snapkv", "h2o", "adakv", "h2o and quest")
    found, below = differences(model, folder, POLICIES[name], kv_dtype, share=1.8 if evicts or kv_dtype else 2.5)
    # which slot is spare, how long each head is: numbers that a table has whatever it holds
    assert min(found) >= -LAYERS * 64, "tensors that nobody accounted for"
    assert max(found) <= LAYERS * 256, "bytes in the account that nobody holds"
    assert below > 0 or evicts


def test_reading_ahead_in_vain_holds_nothing(model, folder, monkeypatch):
    """A job that was cancelled in the queue, because its memory went to others, keeps none of it."""
    cancelled = []

    def late(self, work):
        with self._locked():
            for _ in range(self._pool._max_workers):
                self._pool.submit(time.sleep, 0.02)
            future = self._pool.submit(work)
            future.add_done_callback(lambda done: cancelled.append(done.cancelled()))
            return future

    monkeypatch.setattr(TierManager, "background", late)
    found, _ = differences(model, folder, POLICIES["tokenselect int8"], "int8", share=1.8)
    assert any(cancelled), "nothing was cancelled: nothing was tested"
    assert min(found) >= -LAYERS * 64


def test_what_is_not_counted_is_noticed(model, folder, monkeypatch):
    monkeypatch.setattr(stowage, "_bytes_beside", lambda table, beside: 0)
    found, _ = differences(model, folder, POLICIES["tokenselect int8"])
    assert min(found) < -LAYERS * 64
