"""Votes on int8 keys: against fp64 votes on the rounded keys, and the running index against one made anew."""

import copy
import dataclasses

import pytest
import torch
from test_tokenselect_sets import SMALL, cut, voter

from kvpress import PolicyCache
from kvpress.policies import KNorm, SnapKV, StreamingLLM, TokenSelect, key_index, tokenselect
from kvpress.policies.key_index import KeyIndex, quantise
from kvpress.testing.families import tiny_model


def rounded(keys, levels=127):
    """Once more, in fp64: what int8 codes with a scale for each row stand for."""
    scale = keys.double().abs().amax(dim=-1, keepdim=True) / levels
    return torch.where(scale > 0, (keys.double() / scale).round() * scale, 0.0)


def rounded_voter(policy, levels=127, **changes):
    """The method on rounded keys."""

    def make():
        choose = voter(policy, **changes)()
        return lambda question: choose(
            dataclasses.replace(
                question, keys=rounded(question.keys, levels), plain_keys=rounded(question.plain_keys, levels)
            )
        )

    return make


def int8(**changes):
    return TokenSelect(**{**SMALL, "tail": 2, "threshold": 0.0, "index": "int8", **changes})


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_sets_equal_a_vote_on_rounded_keys(compare, positions, heads):
    model = tiny_model("llama", dtype=torch.float64, num_key_value_heads=heads)
    policy = int8(positions=positions)
    fed, result = compare(model, policy, rounded_voter(policy), blocks=cut(policy), reindex=positions == "reindex")
    assert result.error < 1e-9
    assert result.narrowed > 8
    assert result.sets == 2 * 13
    behind = [layer.table.count - layer.selector.index.covered for layer in fed.cache.policy_layers]
    assert 0 <= min(behind) <= max(behind) <= policy.local


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_padded_rows_chunks_and_turns(compare, llama, positions):
    policy = int8(positions=positions)
    _, result = compare(
        llama,
        policy,
        rounded_voter(policy),
        blocks=cut(policy),
        reindex=positions == "reindex",
        batch=3,
        pads=(0, 14, 5),
        sizes=(9, 20, 1, 1, 1, 1, 14, 1, 1, 1),
    )
    assert result.error < 1e-9
    assert result.narrowed > 3


@pytest.mark.parametrize(
    ("eviction", "shared"),
    [(SnapKV(budget=24, window=6, kernel_size=3), False), (StreamingLLM(budget=24, sinks=3), True)],
    ids=["snapkv", "streaming_llm"],
)
def test_composed_with_eviction(compare, llama, eviction, shared):
    policy = int8(top_k=4, local=6, chunk=6, positions="keep", tail=0)
    fed, result = compare(
        llama, [eviction, policy], rounded_voter(policy, shared=shared), blocks=cut(policy), held=True,
        sizes=(40, *[1] * 12, 9, *[1] * 6) if shared else (40, *[1] * 12),
    )  # fmt: skip
    assert fed.cache.report().evictions > 0
    assert result.error < 1e-9
    assert result.narrowed > 12


@pytest.mark.parametrize("sabotage", ["coarser keys", "exact keys", "one token fewer"])
def test_sabotaged_formulas_are_caught(compare, llama, sabotage):
    policy = int8(positions="keep", tail=0, threshold=2)
    makers = {
        "coarser keys": rounded_voter(policy, levels=15),
        "exact keys": voter(policy),
        "one token fewer": rounded_voter(policy, count=policy.top_k - 1),
    }
    sizes = (40, *[1] * 40)
    compare(llama, policy, rounded_voter(policy), blocks=cut(policy), sizes=sizes)
    with pytest.raises(AssertionError):
        compare(llama, policy, makers[sabotage], blocks=cut(policy), sizes=sizes)


def test_rounding_errs_by_half_a_scale_at_most():
    keys = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    keys[0, 0, 0] = 0
    codes, scales = quantise(keys, "int8")
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    error = (codes.double() * scales.double()[..., None] - keys.double()).abs().amax(dim=-1)
    assert bool((error <= scales.double() / 2 * (1 + 1e-5)).all()) and float(error.max()) > 0
    assert int(codes.abs().max()) == 127 and float(scales[0, 0, 0]) == 0


def check_index(cache):
    """Every layer's index holds the rounded keys of all its slots; returns the slots. Evictions in bulk void it until the next vote."""
    slots = 0
    for layer in cache.policy_layers:
        index, keys = layer.selector.index, layer.keys
        if index.codes is None:
            continue
        assert index.covered == keys.shape[2]
        codes, scales = index.read(0, index.covered)
        expected = quantise(keys, index.form, index.centre)
        assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
        slots += index.covered
    return slots


def step(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits


EVICTIONS = {
    "none": None,
    "snapkv": SnapKV(budget=26, window=4, kernel_size=3),
    "streaming_llm": StreamingLLM(budget=26),
    "knorm in bursts": KNorm(budget=24, interval=5),
}


@pytest.fixture
def at_once(monkeypatch):
    """Every key is taken into the index with its token."""
    monkeypatch.setattr(tokenselect, "TOGETHER", 0)


@pytest.mark.parametrize("local", [6, 20])
def test_keys_of_the_window_wait(monkeypatch, llama, local):
    """Nobody votes for them: the selections are those of an index that follows every token, and it is brought up to date seldom."""
    read, logits = [], []
    extend = KeyIndex._extend
    monkeypatch.setattr(
        KeyIndex,
        "_extend",
        lambda self, keys, slots: (read[-1].append(slots - self.covered), extend(self, keys, slots)),
    )
    ids = torch.randint(3, 90, (1, 100), generator=torch.Generator().manual_seed(0))
    for together in (0, 16, 1000):
        monkeypatch.setattr(tokenselect, "TOGETHER", together)
        read.append([])
        cache = PolicyCache(llama, int8(top_k=4, local=local, chunk=6, threshold=2))
        logits.append([step(llama, cache, piece) for piece in ids.split([40, *[1] * 60], dim=1)])
        wait = min(together, local) + 1
        assert read[-1][-2 * (60 // wait) :] == [wait] * 2 * (60 // wait)
    assert all(torch.equal(one, other) for one, other in zip(logits[0], logits[1], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(logits[0], logits[2], strict=True))


def test_keys_that_are_voted_for_must_not_wait(monkeypatch, llama):
    monkeypatch.setattr(tokenselect.VoteSelector, "_may_wait", lambda self, index, slots: slots - index.covered <= 16)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        test_keys_of_the_window_wait(monkeypatch, llama, 6)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_the_running_index_equals_one_made_anew(monkeypatch, llama, tmp_path, eviction, positions, form):
    """Appending, batch rows in another order, copies, saving, evictions and another turn."""
    read = []
    extend = KeyIndex._extend
    monkeypatch.setattr(
        KeyIndex, "_extend", lambda self, keys, slots: (read.append(slots - self.covered), extend(self, keys, slots))
    )
    policy = int8(top_k=4, local=6, chunk=6, threshold=2, positions=positions, index=form)
    policies = policy if EVICTIONS[eviction] is None else [EVICTIONS[eviction], policy]
    cache, ids = PolicyCache(llama, policies), torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    step(llama, cache, ids[:, :33])
    found = 0
    for at in range(33, 40):
        step(llama, cache, ids[:, at : at + 1])
        found += check_index(cache) > 2 * 22
    assert found >= 6
    cache.reorder_cache(torch.tensor([1, 0]))
    copied = copy.deepcopy(cache)
    step(llama, cache, ids[:, 40:41])
    assert check_index(cache) > 2 * 22
    step(llama, copied, ids.flip(0)[:, 40:41])
    assert check_index(copied) > 2 * 22
    before = len(read)
    cache.save(tmp_path / "saved")
    loaded = PolicyCache.load(tmp_path / "saved", llama)
    assert torch.equal(step(llama, loaded, ids[:, 41:42]), step(llama, cache, ids[:, 41:42]))
    assert check_index(loaded) == check_index(cache) > 2 * 22
    if eviction == "none":
        assert read[before:] == [1] * 4, "the index was made anew"
    for piece in (ids[:, 42:50], ids[:, 50:51], ids[:, 51:52]):
        step(llama, cache, piece)
    assert check_index(cache) > 2 * 22


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_crop_cuts_the_index(monkeypatch, llama, form):
    monkeypatch.setattr(key_index, "FIRST", 20)
    policy, ids = int8(positions="keep", index=form), torch.arange(3, 83).view(1, 80)
    cache, anew = PolicyCache(llama, policy), PolicyCache(llama, policy)
    for each in (cache, anew):
        for piece in ids[:, :36].split([33, 1, 1, 1], dim=1):
            step(llama, each, piece)
        each.crop(-5)
    read = []
    extend = KeyIndex._extend
    monkeypatch.setattr(
        KeyIndex, "_extend", lambda self, keys, slots: (read.append(slots - self.covered), extend(self, keys, slots))
    )
    again = step(llama, cache, ids[:, 60:61])
    assert read == [1, 1] and check_index(cache) == 2 * 32
    for layer in anew.policy_layers:
        layer.selector.rearrange()
    assert torch.equal(again, step(llama, anew, ids[:, 60:61]))
    assert read == [1, 1, 32, 32]


def test_a_stale_index_is_noticed(monkeypatch, llama):
    monkeypatch.setattr(KeyIndex, "crop", lambda self, slots: None)
    with pytest.raises(AssertionError):
        test_crop_cuts_the_index(monkeypatch, llama, "int8")


def test_unknown_indexes_are_refused():
    with pytest.raises(
        ValueError, match=r"index of tokenselect must be one of \['exact', 'int8', 'int4'\], got 'int2'"
    ):
        TokenSelect(index="int2")
    for form in ("int8", "int4"):
        assert TokenSelect.from_dict(TokenSelect(index=form).to_dict()).index == form
    assert TokenSelect().index == "exact"
