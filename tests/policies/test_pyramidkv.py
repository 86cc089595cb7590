"""PyramidKV: budgets by layer, and SnapKV's kept sets under them."""

from __future__ import annotations

import pytest
import torch
from vote_rules import snapkv

from kvpress.cache import PolicyCache
from kvpress.policies import PyramidKV, SnapKV
from kvpress.testing.families import random_tokens, tiny_model


def published(budget: int, window: int, beta: int, tokens: int, layers: int) -> list[int]:
    """The published rule, its step rounded down."""
    mean = budget - window
    if tokens < budget or tokens < 2 * mean:
        return [budget] * layers
    lowest = mean // beta
    highest = 2 * mean - lowest
    if highest >= tokens - window:
        highest = tokens - window
        lowest = 2 * mean - highest
    step = (highest - lowest) // (layers - 1)
    return [highest - layer * step + window for layer in range(layers)]


def budgets(policy: PyramidKV, tokens: int, layers: int) -> list[int]:
    return [policy._layer_budget(policy.budget, tokens, layer, layers) for layer in range(layers)]


def pyramid(budget: int, window: int, beta: int, layers: int):
    return lambda step: published(budget, window, beta, step.seen, layers)[step.layer]


@pytest.fixture(params=[4, 2, 1], ids=["MHA", "GQA", "MQA"])
def three_layers(request):
    return tiny_model("llama", dtype=torch.float64, num_hidden_layers=3, num_key_value_heads=request.param)


def test_kept_sets(three_layers, mode, feed):
    policy = PyramidKV(budget=10, window=4, kernel_size=3, beta=2)
    feed(three_layers, policy, snapkv(pyramid(10, 4, 2, 3), 4, 3), mode)


@pytest.mark.parametrize("pooling, reduce", [("avg", "mean"), ("max", "sum"), ("max", "max")])
def test_pooling_and_reduction(gqa, feed, pooling, reduce):
    policy = PyramidKV(budget=10, window=4, kernel_size=5, beta=6, pooling=pooling, group_reduce=reduce)
    for mode in ("padded", "turns"):
        feed(gqa, policy, snapkv(pyramid(10, 4, 6, 2), 4, 5, pooling, reduce), mode)


def test_wrong_layer_is_noticed(gqa, feed):
    upside_down = snapkv(lambda step: published(10, 4, 6, step.seen, 2)[1 - step.layer], 4, 3)
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, PyramidKV(budget=10, window=4, kernel_size=3, beta=6), upside_down)


@pytest.mark.parametrize("layers", [2, 3, 22, 30, 32])
@pytest.mark.parametrize("tokens", [50, 130, 250, 400, 5000])
@pytest.mark.parametrize("budget, window, beta", [(128, 8, 20), (133, 32, 20), (40, 8, 2), (9, 8, 20), (8, 8, 20)])
def test_budgets(layers, tokens, budget, window, beta):
    own = budgets(PyramidKV(budget=budget, window=window, beta=beta), tokens, layers)
    theirs = published(budget, window, beta, tokens, layers)
    assert sum(own) == layers * budget
    assert own == sorted(own, reverse=True)
    assert min(own) >= window
    assert own[0] == theirs[0]
    assert max(abs(a - b) for a, b in zip(own, theirs, strict=True)) < layers
    if sum(theirs) == layers * budget:
        assert own == theirs


def test_steepness():
    own = budgets(PyramidKV(budget=128, window=8, beta=20), 5000, 31)
    assert (own[0], own[-1]) == (8 + 234, 8 + 6)
    assert len(set(budgets(PyramidKV(budget=128, window=8, beta=1), 5000, 31))) == 1


def test_equal_budgets_are_snapkv():
    model = tiny_model("llama", num_hidden_layers=3)
    ids = random_tokens(1, 60)
    kept = []
    for policy in (PyramidKV(budget=16, window=4, beta=1), SnapKV(budget=16, window=4), PyramidKV(budget=16, window=4)):
        cache = PolicyCache(model, policy)
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
            for token in ids[0, 40:]:
                model(token.view(1, 1), past_key_values=cache)
        kept.append([cache.kept_positions(layer).tolist() for layer in range(3)])
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("beta", [0, 1.5, True])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta of pyramidkv must be an integer >= 1"):
        PyramidKV(budget=64, beta=beta)
