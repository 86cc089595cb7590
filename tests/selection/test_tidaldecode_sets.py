"""TidalDecode (arXiv 2410.05076): two layers choose, the layers after them attend to the same."""

import pytest
import torch

from kvpress import PolicyCache
from kvpress.policies import SnapKV, StreamingLLM, TidalDecode
from kvpress.testing.families import tiny_model

TOP_K = 9


@pytest.fixture
def deep():
    return tiny_model("llama", dtype=torch.float64, num_hidden_layers=5)


def tidal(*, dense=1, again=3, top_k=TOP_K, reduce=max, apart=False):
    def choose(question):
        if not question.decoding or len(question.held[0]) <= top_k or question.layer < dense:
            return None
        heads, kv_heads = question.query.shape[0], question.keys.shape[0]
        if question.layer in (dense, again) or apart:
            sets = []
            for owner, held in enumerate(question.held):
                mine = [head for head in range(heads) if head * kv_heads // heads == owner]
                products = {
                    p: reduce(float(question.query[head, 0] @ question.keys[owner, p]) for head in mine) for p in held
                }
                sets.append(sorted(held, key=lambda p: (products[p], p))[-top_k:])
            question.shared[question.first] = sets
        return question.shared[question.first] if question.layer not in (dense, again) else None

    return lambda: choose


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_sets_and_logits_equal_the_formula(compare, heads):
    model = tiny_model("llama", dtype=torch.float64, num_hidden_layers=5, num_key_value_heads=heads)
    policy = TidalDecode(top_k=TOP_K, dense_layers=1, reselect_layer=3)
    fed, result = compare(model, policy, tidal(), sizes=(25, *[1] * 8))
    assert result.error < 1e-9
    assert result.narrowed == 2 * 8  # layers 2 and 4
    assert fed.selected[-1][2].shape[-1] == TOP_K
    assert fed.selected[-1][3].shape[-1] == 33


def test_followers_attend_to_what_was_chosen(feed, deep):
    cache = PolicyCache(deep, TidalDecode(top_k=TOP_K, dense_layers=0, reselect_layer=3))
    feed(deep, cache, torch.arange(3, 40)[None], (30, 1, 1))
    first, second, last = (cache.selected_positions(layer) for layer in (1, 2, 4))
    assert torch.equal(first, second)
    assert not torch.equal(second, last)


def test_padded_rows_and_turns_equal_each_row_alone(compare, deep):
    policy = TidalDecode(top_k=TOP_K, dense_layers=1, reselect_layer=3)
    _, result = compare(deep, policy, tidal(), sizes=(25, *[1] * 6, 5, *[1] * 4), batch=3, pads=(0, 8, 3))
    assert result.error < 1e-9
    assert result.narrowed >= 2 * 9


def test_with_streaming_llm(compare, deep):
    policies = [StreamingLLM(budget=16), TidalDecode(top_k=TOP_K, dense_layers=1, reselect_layer=3)]
    fed, result = compare(deep, policies, tidal(), sizes=(25, *[1] * 8), held=True)
    assert fed.cache.report().evictions
    assert result.error < 1e-9
    assert result.narrowed == 2 * 8


def test_refused_with_policies_that_keep_other_tokens_in_each_layer(deep):
    with pytest.raises(ValueError, match="needs the same tokens in all layers: it does not go with snapkv"):
        PolicyCache(deep, [SnapKV(budget=16, window=4), TidalDecode()])


@pytest.mark.parametrize(
    "sabotage", [tidal(again=2), tidal(top_k=TOP_K - 1), tidal(reduce=min), tidal(dense=0), tidal(apart=True)]
)
def test_sabotaged_formulas_are_caught(compare, deep, sabotage):
    policy = TidalDecode(top_k=TOP_K, dense_layers=1, reselect_layer=3)
    with pytest.raises(AssertionError):
        _, result = compare(deep, policy, sabotage, sizes=(25, *[1] * 8))
        assert result.error < 1e-9


def test_the_default_layer_is_two_fifths_of_the_depth_and_an_impossible_one_is_refused(deep):
    policy = TidalDecode(dense_layers=2)
    chooses = [policy.selector(layer, layer, 32, {}).chooses for layer in range(32)]
    assert [layer for layer, chosen in enumerate(chooses) if chosen] == [2, 13]  # the paper's for Llama-3-8B
    with pytest.raises(
        ValueError, match="reselect_layer of tidaldecode must be below the model's 5 compressed layers, got 7"
    ):
        PolicyCache(deep, TidalDecode(reselect_layer=7))
