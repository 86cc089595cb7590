"""The centre that int4 keys are rounded about: a mean of tokens, which follows its rows."""

import copy

import torch
from test_rounded_votes import Form

from kvpress import PolicyCache
from kvpress.policies import key_index
from kvpress.policies.key_index import centre_of


def test_the_centre_is_the_mean_of_tokens(monkeypatch):
    keys = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0)) + 3
    tokens = torch.arange(40).expand(2, 3, 40) < 20
    tokens[1, 0, :5] = False
    keys[1, 0, :5] = 1e30
    keys[0, 1, 7, 2] = torch.nan
    tokens[1, 2] = False
    for piece in (1024, 7):
        monkeypatch.setattr(key_index, "PIECE", piece)
        found = centre_of(keys, tokens)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0, 0], keys[0, 0, :20].mean(dim=0))
        torch.testing.assert_close(found[1, 0], keys[1, 0, 5:20].mean(dim=0))
        torch.testing.assert_close(found[0, 1, 2], keys[0, 1, :20, 2].nan_to_num(nan=0.0).mean())
        assert (found[1, 2] == 0).all() and float(found[0, 0].min()) > 1


def test_a_centre_follows_the_verbs(llama, monkeypatch, tmp_path):
    """A row has one as soon as it has the tokens, keeps it as rows are chosen, saved and copied, and loses it with them."""
    monkeypatch.setattr(key_index, "FIRST", 20)
    cache = PolicyCache(llama, Form("int4").policy(top_k=4, local=6, chunk=6, threshold=2))
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :16] = 0

    def step(given, start, end):
        with torch.no_grad():
            llama(ids[:, start:end], past_key_values=given, attention_mask=mask[:, :end])
        return given.policy_layers[1].selector.index

    step(cache, 0, 33)
    for end in range(34, 37):
        index = step(cache, end - 1, end)
        assert index.centred.tolist() == [[True, True], [end == 36] * 2]
        assert index.settled == (end == 36)
    keys = cache.policy_layers[1].keys
    for row, pad in ((0, 0), (1, 16)):
        expected = keys[row, :, pad : pad + 20].double().mean(dim=1).float()
        assert torch.equal(index.centre[row], expected) and expected.abs().max() > 0.01
    seen = index.centre.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(index.centre, seen.flip(0)) and not torch.equal(seen, seen.flip(0))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "saved")
    loaded = PolicyCache.load(tmp_path / "saved", llama)
    for given in (loaded, copy.deepcopy(cache)):
        again = given.policy_layers[1].selector.index
        assert torch.equal(again.centre, seen) and again.settled
    cache.crop(-2)
    index = step(cache, 34, 35)
    assert index.centred.tolist() == [[True, True], [False, False]]
    assert torch.equal(index.centre[0], seen[0]) and not index.centre[1].any()
