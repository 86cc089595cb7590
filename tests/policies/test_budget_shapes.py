"""Budgets by layer and by KV head, given by the user, under any policy."""

from __future__ import annotations

import pytest
import torch
from vote_rules import adakv, skewed

from kvpress.cache import PolicyCache
from kvpress.policies import H2O, TOVA, AdaKV, KNorm, PyramidKV, SnapKV, StreamingLLM, TidalDecode
from kvpress.policies.base import EvictionPolicy
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.kept_sets import best, snapkv_votes

LIMITS = {0: [6, 13], 1: [9, 9]}


def by_head(step):
    votes = snapkv_votes(step, 4, 3)
    recent = range(step.seen - 4, step.seen)
    return [best(votes[head], held, LIMITS[step.layer][head], recent) for head, held in enumerate(step.held)]


def test_kept_sets_by_head(gqa, mode, feed):
    feed(gqa, SnapKV(budget=((6, 13), 9), window=4, kernel_size=3), by_head, mode)


def test_exchanged_heads_are_noticed(gqa, feed):
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, SnapKV(budget=((13, 6), 9), window=4, kernel_size=3), by_head)


def test_shared_out_within_given_layers(gqa, feed):
    rules = {0: adakv(8, 4, 3, 0.2), 1: adakv(12, 4, 3, 0.2)}
    feed(skewed(gqa), AdaKV(budget=(8, 12), window=4, kernel_size=3), lambda step: rules[step.layer](step), "turns")


@pytest.mark.parametrize("policy", [StreamingLLM, TOVA, H2O, KNorm, SnapKV], ids=lambda policy: policy.name)
@pytest.mark.parametrize("interval", [1, 3])
def test_every_policy(policy: type[EvictionPolicy], interval):
    """A share and a number beside each other; what is kept is what is held."""
    arguments = {"window": 4} if policy is SnapKV else {}
    model = tiny_model("llama")
    cache = PolicyCache(model, policy(budget=[0.5, [7, 11]], interval=interval, **arguments))
    with torch.no_grad():
        model(random_tokens(1, 40), past_key_values=cache)
        for token in random_tokens(6):
            model(token.view(1, 1), past_key_values=cache)
    held = [layer.table.held.tolist() for layer in cache.policy_layers]
    if interval == 1:
        assert held == [[[20, 20]], [[7, 11]]]
    for layer, limits in zip(held, ([20, 20], [7, 11]), strict=True):
        assert all(limit <= tokens < limit + interval for tokens, limit in zip(layer[0], limits, strict=True))
    rows = cache.policy_layers[1].table.rows
    assert rows is not None and rows.total == 7 + 11 + 2 * interval


def test_to_dict_and_back():
    policy = H2O(budget=[0.5, [7, 11]])
    assert policy.budget == (0.5, (7, 11))
    assert H2O.from_dict(policy.to_dict()) == policy
    assert hash(policy) == hash(H2O(budget=(0.5, (7, 11))))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SnapKV(budget=(64, 31)), "budget of snapkv must be at least 32"),
        (lambda: SnapKV(budget=()), "budget must have an entry for each compressed layer"),
        (lambda: SnapKV(budget=(64, "1MB")), "entries of budget must be tokens or shares"),
        (lambda: SnapKV(budget=(64, ())), "entries of budget must be tokens or shares"),
        (lambda: SnapKV(budget=(64, (64, 0))), "budget must be tokens"),
        (lambda: SnapKV(budget=(64, (64, True))), "budget must be tokens"),
        (lambda: PyramidKV(budget=(64, 64)), "budget of pyramidkv must be one number for all layers"),
        (lambda: PyramidKV(budget=((64, 64),)), "budget of pyramidkv must be one number for all layers"),
        (lambda: AdaKV(budget=((64, 64), 64)), "budget of adakv must be one number for all heads"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_number_of_layers_or_heads():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="budget must have an entry for each of 2 compressed layers, got 3"):
        PolicyCache(model, H2O(budget=(8, 8, 8)))
    cache = PolicyCache(model, H2O(budget=(8, (8, 9, 10))))
    with pytest.raises(ValueError, match="budget of h2o must have an entry for each of 2 KV heads in layer 1, got 3"):
        model(random_tokens(1, 20), past_key_values=cache)


def test_layers_that_differ_do_not_go_with_one_choice_for_all():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="needs the same tokens in all layers"):
        PolicyCache(model, [StreamingLLM(budget=(16, 20)), TidalDecode(top_k=8)])


def test_columns_hold_no_graph():
    model, ids = tiny_model("llama"), random_tokens(1, 40)
    cache = PolicyCache(model, H2O(budget=12))
    model(ids[:, :30], past_key_values=cache)
    for token in ids[0, 30:]:
        model(token.view(1, 1), past_key_values=cache)
    tensors = [tensor for layer in cache.policy_layers for tensor in layer.table.tensors() if tensor is not None]
    assert tensors and not any(tensor.requires_grad for tensor in tensors)
