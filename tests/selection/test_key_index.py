"""The index of rounded keys: it follows its slots through every verb, against one made anew."""

import copy

import pytest
import torch
from test_rounded_votes import Form

from kvpress import PolicyCache
from kvpress.policies import KNorm, SnapKV, StreamingLLM, TokenSelect, key_index, tokenselect
from kvpress.policies.key_index import PIECE, KeyIndex, quantise
from kvpress.testing.families import tiny_model


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
        cache = PolicyCache(llama, Form("int8").policy(top_k=4, local=local, chunk=6, threshold=2))
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
    policy = Form(form).policy(top_k=4, local=6, chunk=6, threshold=2, positions=positions)
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
    policy, ids = Form(form).policy(positions="keep"), torch.arange(3, 83).view(1, 80)
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


def test_bytes_are_those_of_half_a_byte_a_number():
    index, keys = KeyIndex("int4"), torch.empty(2, 3, 100, 64, device="meta")
    room = 100 + max(4, 100 // 64)
    assert index.bytes_to_grow(keys) == 2 * 3 * (room * (32 + 4) + 64 * 4 + 1)
    real = torch.randn(2, 3, 100, 64)
    index.centre, index.centred = real.mean(2), torch.ones(2, 3, dtype=torch.bool)
    assert index.bytes_to_grow(keys) == 2 * 3 * room * 36
    index._extend(real, 100)
    assert sum(tensor.nbytes for tensor in index.tensors()) == 2 * 3 * (room * 36 + 64 * 4 + 1)
    assert index.bytes_to_grow(keys) == 0 and PIECE > 100


def test_head_sizes_that_do_not_fit_are_refused():
    model = tiny_model("llama", hidden_size=48, head_dim=12)
    with pytest.raises(ValueError, match="int4 rows need head sizes that are multiples of 8, got 12"), torch.no_grad():
        model(torch.arange(3, 63)[None], past_key_values=PolicyCache(model, Form("int4").policy()))
