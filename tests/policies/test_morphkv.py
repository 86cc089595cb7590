"""MorphKV: the last queries' softmax over the older tokens, from the dense weights."""

from __future__ import annotations

import copy

import pytest
import torch

from kvpress.cache import PolicyCache
from kvpress.policies import TOVA, MorphKV
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.kept_sets import Rule, best


def morphkv(budget: int, window: int, fuse: str = "sum") -> Rule:
    def rule(step):
        kv_heads = len(step.held)
        rows = step.state.setdefault("rows", [])
        # scores of the group's heads, summed, less a constant of the row
        rows.extend(step.weights.log().unflatten(0, (kv_heads, -1)).sum(dim=1).unbind(dim=1))
        del rows[:-window]
        kept = []
        for head, held in enumerate(step.held):
            older = [position for position in held if position < step.seen - window]
            score = torch.zeros(step.seen, dtype=torch.float64)
            if older:
                weights = torch.stack([row[head][older].softmax(dim=-1) for row in rows])
                score[older] = weights.sum(dim=0) if fuse == "sum" else weights.amax(dim=0)
            kept.append(best(score, held, budget, range(step.seen - window, step.seen)))
        return kept

    return rule


@pytest.mark.parametrize("fuse", ["sum", "max"])
def test_kept_sets(model, mode, feed, fuse):
    feed(model, MorphKV(budget=12, window=5, fuse=fuse), morphkv(12, 5, fuse), mode)


@pytest.mark.parametrize("window", [1, 3, 12])
def test_windows(gqa, feed, window):
    for mode in ("padded", "chunks", "turns"):
        feed(gqa, MorphKV(budget=12, window=window), morphkv(12, window), mode)


@pytest.mark.parametrize("wrong", [morphkv(12, 5, "max"), morphkv(12, 4)])
def test_another_formula_is_noticed(gqa, feed, wrong):
    with pytest.raises(AssertionError):
        feed(gqa, MorphKV(budget=12, window=5), wrong, "turns")


def run(model, policy, tokens=70):
    ids = random_tokens(1, tokens)
    cache = PolicyCache(model, policy)
    kept = []
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        for step in range(30, tokens):
            model(ids[:, step : step + 1], past_key_values=cache)
            kept.append([cache.kept_positions(layer).tolist() for layer in range(2)])
    return kept


def test_a_window_of_one_is_tova():
    """With one head there is nothing to reduce; then only the newest token, which TOVA does not protect, can differ."""
    model = tiny_model("llama", dtype=torch.float64, num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    for layer in model.model.layers:  # a token attends to itself: TOVA keeps the newest of its own accord
        layer.self_attn.k_proj.weight = layer.self_attn.q_proj.weight
    tova = run(model, TOVA(budget=12))
    assert all(layer[0][0][-1] == 30 + step for step, kept in enumerate(tova) for layer in kept)
    assert run(model, MorphKV(budget=12, window=1)) == tova
    assert run(model, MorphKV(budget=12, window=2)) != tova


def test_the_ring_is_part_of_the_cache(tmp_path):
    """Copied, saved, counted and reset with it."""
    model, ids = tiny_model("llama"), random_tokens(1, 50)
    cache = PolicyCache(model, MorphKV(budget=14, window=6))
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        for token in ids[0, 30:35]:
            model(token.view(1, 1), past_key_values=cache)
        twin = copy.deepcopy(cache)
        cache.save(tmp_path / "saved")
        loaded = PolicyCache.load(tmp_path / "saved", model)
        assert cache.nbytes == twin.nbytes == loaded.nbytes
        for held in (cache, twin, loaded):
            for token in ids[0, 35:]:
                model(token.view(1, 1), past_key_values=held)
    kept = [[held.kept_positions(layer).tolist() for layer in range(2)] for held in (cache, twin, loaded)]
    assert kept[0] == kept[1] == kept[2]
    ring = cache.policy_layers[0].keeper.recent
    assert ring.queries.shape == (1, 2, 6, 8)
    assert cache.nbytes > sum(layer.table.nbytes for layer in cache.policy_layers)
    cache.reset()
    assert cache.policy_layers[0].keeper.recent.queries is None


def test_a_limit_in_bytes_holds():
    model = tiny_model("llama")
    cache = PolicyCache(model, MorphKV(budget="16KB", window=8))
    with torch.no_grad():
        model(random_tokens(1, 80), past_key_values=cache)
        for token in random_tokens(5):
            model(token.view(1, 1), past_key_values=cache)
            assert 13_000 < cache.nbytes <= 16_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window": 0}, "window of morphkv must be an integer >= 1"),
        ({"fuse": "mean"}, "fuse of morphkv must be one of"),
        ({"budget": 31}, "budget of morphkv must be at least 32"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        MorphKV(**{"budget": 64, **arguments})
