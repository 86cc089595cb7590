"""AdaKV: budgets by head from the best votes of a layer, and memory that is really freed."""

from __future__ import annotations

import pytest
import torch
from vote_rules import adakv, skewed

from kvpress.cache import PolicyCache
from kvpress.policies import AdaKV, SnapKV
from kvpress.testing.families import random_tokens, tiny_model


def test_kept_sets(model, mode, feed):
    sets = feed(skewed(model), AdaKV(budget=10, window=4, kernel_size=3), adakv(10, 4, 3, 0.2), mode)
    lengths = {len(head) for row in sets.kept for layer in row.values() for head in layer}
    assert (len(lengths) > 1) == (model.config.num_key_value_heads > 1)


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_floor(gqa, feed, floor):
    for mode in ("padded", "chunks", "turns"):
        feed(skewed(gqa), AdaKV(budget=11, window=2, kernel_size=5, floor=floor), adakv(11, 2, 5, floor), mode, seed=3)


def test_share_of_each_row(gqa, feed):
    feed(skewed(gqa), AdaKV(budget=0.5, window=2, kernel_size=3), adakv(0.5, 2, 3, 0.2), "padded")


def test_another_floor_is_noticed(gqa, feed):
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(skewed(gqa), AdaKV(budget=10, window=4, kernel_size=3, floor=0.2), adakv(10, 4, 3, 1.0))


def prefill(policy, tokens: int = 600, **changes):
    model = skewed(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=64, **changes))
    cache = PolicyCache(model, policy)
    with torch.no_grad():
        model(random_tokens(1, tokens), past_key_values=cache)
    return model, cache


def test_memory_is_freed():
    model, cache = prefill(AdaKV(budget=0.5), 600)
    for token in random_tokens(8):
        with torch.no_grad():
            model(token.view(1, 1), past_key_values=cache)
    assert cache.nbytes <= 0.52 * cache.full_nbytes
    for layer in cache.policy_layers:
        held = layer.table.held
        assert held.sum() == 4 * 300
        assert held.max() - held.min() > 20  # else the heads were cut alike
        rows = layer.table.rows
        assert rows is not None and rows.total == held.sum() + 4


def test_budgets_add_up():
    generator = torch.Generator().manual_seed(0)
    policy = AdaKV(budget=20, window=3, kernel_size=1, floor=0.37)
    seen = set()
    for heads in (1, 2, 3, 5, 8):
        for _ in range(20):
            votes = torch.rand(heads, 50, generator=generator) ** torch.randint(1, 9, (heads, 1), generator=generator)
            own = policy._head_budgets(votes, 20, heads * 50)
            assert sum(own) == heads * 20
            assert min(own) >= 3 + int(0.37 * 17)
            seen.add(len(set(own)) > 1)
    assert seen == {True, False}


def test_floor_of_one_is_snapkv():
    kept = []
    for policy in (AdaKV(budget=64, floor=1.0), SnapKV(budget=64), AdaKV(budget=64, floor=0.0)):
        _, cache = prefill(policy, 200)
        kept.append([cache.kept_positions(layer).tolist() for layer in range(2)])
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan"), "0.2"])
def test_bad_floor(floor):
    with pytest.raises(ValueError, match="floor of adakv must be a share"):
        AdaKV(budget=64, floor=floor)
