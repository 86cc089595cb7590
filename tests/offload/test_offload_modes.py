"""Offload under `torch.inference_mode()`, and verbs that break off in one layer when others have them behind them."""

import copy

import pytest
import torch

from kvpress import PolicyCache
from kvpress.errors import CacheStateError
from kvpress.offload import Offload
from kvpress.offload.errors import TierFullError
from kvpress.offload.stowage import Stowage
from kvpress.policies import Full, Quest, SnapKV, TokenSelect
from kvpress.testing.families import random_tokens, tiny_model

MODES = (torch.no_grad, torch.inference_mode)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("modes", [MODES, MODES[::-1]])
def test_blocks_come_back_in_either_mode(folder, modes, kv_dtype):
    model, ids, found = tiny_model("llama"), random_tokens(2, 44), []
    for offload in (None, Offload(disk=folder, block=4)):
        cache, logits = PolicyCache(model, Full(), kv_dtype=kv_dtype, offload=offload), []
        for number, piece in enumerate(ids.split([30, 1, 1, 5, 1, 1, 5], dim=1)):
            with modes[number % 2]():
                logits.append(model(piece, past_key_values=cache).logits.clone())
        found.append(torch.cat([each.clone() for each in logits], dim=1))
        if offload is not None:
            assert cache.report().tiers[-1].bytes_out > 0
        cache.close()
    assert torch.equal(*found)


@pytest.mark.parametrize("policy", [Full(), SnapKV(budget=20, window=4)])
def test_a_copy_made_in_inference_mode_goes_on_without(policy):
    model, ids = tiny_model("llama"), random_tokens(1, 30)
    cache = PolicyCache(model, policy)
    with torch.no_grad():
        model(ids[:, :24], past_key_values=cache)
        with torch.inference_mode():
            copied = copy.deepcopy(cache)
        for token in ids[:, 24:].split(1, dim=1):
            assert torch.equal(*(model(token, past_key_values=each).logits for each in (cache, copied)))


@pytest.mark.parametrize("policy", [
    Quest(top_k=8, page_size=4, skip_layers=0),
    TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=2, index="int8"),
    TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=2, threshold=2, index="int4"),
    SnapKV(budget=20, window=4),
])  # fmt: skip
def test_rows_chosen_in_inference_mode_go_on_without(policy):
    model, ids, found = tiny_model("llama"), random_tokens(3, 36), []
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :3] = 0
    for mode in MODES:
        cache, logits = PolicyCache(model, policy), []

        def step(rows, first, last, cache=cache, logits=logits):
            with torch.no_grad():
                given = {"attention_mask": mask[rows, :last], "past_key_values": cache}
                logits.append(model(ids[rows, first:last], **given).logits[:, -1])

        step([0, 1, 2], 0, 28)
        step([0, 1, 2], 28, 29)
        with mode():
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_repeat_interleave(2)
        for token in range(29, 36):
            step([0, 0, 2, 2], token, token + 1)
        found.append(torch.cat(logits))
    assert torch.equal(*found)


@pytest.mark.parametrize("verb", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"])
def test_what_broke_off_in_one_layer_is_not_served(folder, monkeypatch, verb):
    model, ids = tiny_model("llama"), random_tokens(2, 31)
    cache = PolicyCache(model, Full(), offload=Offload(disk=folder, block=4))

    def step(piece):
        with torch.no_grad():
            return model(piece, past_key_values=cache).logits

    def full(self, *given):
        if self.layer == 1:
            raise TierFullError("host", "has no room")
        return originals[(given[1:] and "select_batch") or "cut"](self, *given)

    step(ids[:, :30])
    originals = {name: getattr(Stowage, name) for name in ("select_batch", "cut")}
    with monkeypatch.context() as patch:
        for name in originals:
            patch.setattr(Stowage, name, full)
        argument = {"crop": -9, "batch_repeat_interleave": 2}.get(verb, torch.tensor([1, 0]))
        with pytest.raises(TierFullError):
            getattr(cache, verb)(argument)
    with pytest.raises(CacheStateError, match=r"cache\.reset"):
        step(ids[:, 30:])
    with pytest.raises(CacheStateError, match=r"cache\.reset"):
        cache.save(folder / "saved")
    copied = copy.deepcopy(cache)
    with pytest.raises(CacheStateError, match=r"cache\.reset"), torch.no_grad():
        model(ids[:, 30:], past_key_values=copied)
    copied.close()
    cache.reset()
    again, fresh = step(ids), PolicyCache(model, Full())
    with torch.no_grad():
        assert torch.equal(again, model(ids, past_key_values=fresh).logits)
    cache.close()
