"""interval=: a head is cut back to its budget when it holds `interval` tokens more, and not before."""

from __future__ import annotations

import pytest
import torch
from vote_rules import adakv, skewed, snapkv

from kvpress.cache import PolicyCache
from kvpress.policies import AdaKV, Full, SnapKV, StreamingLLM
from kvpress.testing.families import random_tokens, tiny_model


def bursts(rule, interval):
    def burst(step):
        cut = rule(step)
        limits = step.state.get("limits") or [step.state["limit"]] * len(step.held)
        return [
            held if len(held) < limit + interval else kept
            for held, kept, limit in zip(step.held, cut, limits, strict=True)
        ]

    return burst


@pytest.mark.parametrize("interval", [2, 5])
def test_equal_heads(gqa, mode, feed, interval):
    rule = bursts(snapkv(lambda step: 10, 4, 3), interval)
    feed(gqa, SnapKV(budget=10, window=4, kernel_size=3, interval=interval), rule, mode, steps=12)


@pytest.mark.parametrize("interval", [2, 5])
def test_heads_of_unequal_length(gqa, mode, feed, interval):
    policy = AdaKV(budget=10, window=4, kernel_size=3, interval=interval)
    feed(skewed(gqa), policy, bursts(adakv(10, 4, 3, 0.2), interval), mode, steps=12)


def test_rows_of_unequal_budgets(gqa, feed):
    rule = bursts(snapkv(lambda step: step.prompt // 2, 4, 3), 3)
    feed(gqa, SnapKV(budget=0.5, window=4, kernel_size=3, interval=3), rule, "padded", steps=12)


def test_other_intervals_are_noticed(gqa, feed):
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, SnapKV(budget=10, window=4, kernel_size=3, interval=5), bursts(snapkv(lambda step: 10, 4, 3), 4))


def test_memory_stays_below_budget_and_interval():
    model = tiny_model("llama")
    cache = PolicyCache(model, StreamingLLM(budget=16, interval=8))
    buffers, sizes = set(), set()
    with torch.no_grad():
        model(random_tokens(1, 40), past_key_values=cache)
        for token in random_tokens(64):
            model(token.view(1, 1), past_key_values=cache)
            buffers.add(cache.policy_layers[0].table.keys.shape[2])
            sizes.add(cache.policy_layers[0].table.held.max())
    assert buffers == {24}
    assert sizes == set(range(16, 24))


def test_a_limit_in_bytes_holds():
    model = tiny_model("llama")
    cache = PolicyCache(model, StreamingLLM(budget="12KB", interval=10))
    with torch.no_grad():
        model(random_tokens(1, 60), past_key_values=cache)
        for token in random_tokens(25):
            model(token.view(1, 1), past_key_values=cache)
            assert 9_000 < cache.nbytes <= 12_000


@pytest.mark.parametrize("interval", [0, -1, 1.5, True])
def test_bad_values(interval):
    with pytest.raises(ValueError, match="interval of streaming_llm must be an integer >= 1"):
        StreamingLLM(budget=16, interval=interval)


def test_full_has_no_bursts():
    with pytest.raises(ValueError, match="interval of full must be 1"):
        Full(interval=2)
