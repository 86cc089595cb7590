"""Votes on int4 keys: against fp64 votes on keys and queries that are rounded once more, by a matrix that is written out."""

import copy
import dataclasses

import pytest
import torch
from test_int8_index import int8
from test_tokenselect_sets import cut, voter

from kvpress import PolicyCache
from kvpress.policies import SnapKV, StreamingLLM, TokenSelect, key_index
from kvpress.policies.key_index import PIECE, KeyIndex, centre_of
from kvpress.testing.families import tiny_model
from kvpress.testing.hadamard_oracle import rounded


@pytest.fixture(params=[17, 1000], ids=["centred", "no centre"])
def first(request, monkeypatch):
    """Tokens that make a centre: so many that each row has them some day, but not at once; or more than there are."""
    monkeypatch.setattr(key_index, "FIRST", request.param)
    return request.param


def int4(**changes):
    return int8(index="int4", **changes)


def rounded_voter(policy, first=1000, *, levels=7, asked=127, **changes):
    """The method on rounded keys, asked by rounded queries."""

    def make():
        choose = voter(policy, ask=lambda query: rounded(query, asked), **changes)()

        def whole(keys):
            middle = keys[:, :first].mean(dim=1, keepdim=True) if keys.shape[1] >= first else 0
            return rounded(keys - middle, levels)

        return lambda question: choose(
            dataclasses.replace(question, keys=whole(question.keys), plain_keys=whole(question.plain_keys))
        )

    return make


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_sets_equal_a_vote_on_rounded_keys(compare, first, positions, heads):
    model = tiny_model("llama", dtype=torch.float64, num_key_value_heads=heads)
    policy = int4(positions=positions)
    _, result = compare(model, policy, rounded_voter(policy, first), blocks=cut(policy), reindex=positions == "reindex")
    assert result.error < 1e-9
    assert result.narrowed > 8
    assert result.sets == 2 * 13


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_padded_rows_chunks_and_turns(compare, first, llama, positions):
    policy = int4(positions=positions)
    _, result = compare(
        llama,
        policy,
        rounded_voter(policy, first),
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
    policy = int4(top_k=4, local=6, chunk=6, positions="keep", tail=0)
    fed, result = compare(
        llama, [eviction, policy], rounded_voter(policy, shared=shared), blocks=cut(policy), held=True,
        sizes=(40, *[1] * 12, 9, *[1] * 6) if shared else (40, *[1] * 12),
    )  # fmt: skip
    assert fed.cache.report().evictions > 0
    assert result.error < 1e-9
    assert result.narrowed > 12


@pytest.mark.parametrize("sabotage", ["finer keys", "exact keys", "no centre", "coarser queries", "one token fewer"])
@pytest.mark.parametrize("first", [17], indirect=True)
def test_sabotaged_formulas_are_caught(compare, first, llama, sabotage):
    policy = int4(positions="keep", tail=0, threshold=2)
    makers = {
        "finer keys": rounded_voter(policy, first, levels=8),
        "exact keys": voter(policy),
        "no centre": rounded_voter(policy),
        "coarser queries": rounded_voter(policy, first, asked=7),
        "one token fewer": rounded_voter(policy, first, count=policy.top_k - 1),
    }
    sizes = (40, *[1] * 40)
    compare(llama, policy, rounded_voter(policy, first), blocks=cut(policy), sizes=sizes)
    with pytest.raises(AssertionError):
        compare(llama, policy, makers[sabotage], blocks=cut(policy), sizes=sizes)


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


@pytest.mark.parametrize("first", [20], indirect=True)
def test_a_centre_follows_the_verbs(llama, tmp_path, first):
    """A row has one as soon as it has the tokens, keeps it as rows are chosen, saved and copied, and loses it with them."""
    cache = PolicyCache(llama, int4(top_k=4, local=6, chunk=6, threshold=2))
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
        model(torch.arange(3, 63)[None], past_key_values=PolicyCache(model, int4()))
    assert isinstance(int4(), TokenSelect)
