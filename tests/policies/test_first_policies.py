"""Kept sets of the first policies against their formulas, from dense fp64 weights and from `output_attentions` of an eager model."""

import math

import pytest
import torch

from kvpress.cache import PolicyCache
from kvpress.policies import TOVA, EvictionPolicy, KNorm, SnapKV, StreamingLLM
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.kept_sets import best


def streaming(budget, sinks):
    def rule(step):
        recent = budget - sinks
        return [[p for p in held if p < sinks or p >= step.seen - recent] for held in step.held]

    return rule


def tova(budget):
    def rule(step):
        last = step.weights[:, -1].mean(dim=0)
        return [best(last, held, budget) for held in step.held]

    return rule


def knorm(budget):
    def rule(step):
        norms = step.keys.float().norm(dim=-1)  # of equal tokens only rounding tells the norms apart: rounded as stored
        return [best(-norms[head], held, budget) for head, held in enumerate(step.held)]

    return rule


def snapkv(budget, window, kernel=3, pooling="max", reduce="mean"):
    def pooled(scores):
        half, out = kernel // 2, []
        for at in range(len(scores)):
            near = scores[max(at - half, 0) : at + half + 1]
            out.append(max(near) if pooling == "max" else sum(near) / kernel)
        return out

    def rule(step):
        new = step.weights.shape[1]
        rows = min(new, window)
        votes_before = step.state.setdefault("votes", [{} for _ in step.held])
        heads = step.weights[:, -rows:].sum(dim=1).unflatten(0, (len(step.held), -1))
        reduced = {"mean": heads.mean(dim=1), "max": heads.amax(dim=1), "sum": heads.sum(dim=1)}[reduce]
        kept = []
        for head, held in enumerate(step.held):
            before = [p for p in held if p < step.seen - window]
            inside = [p for p in held if p >= step.seen - window]
            fresh = [float(reduced[head, p]) for p in before]
            if new > 1:
                fresh = pooled(fresh)
            votes = dict(zip(before, fresh, strict=True)) | {p: float(reduced[head, p]) for p in inside}
            for p in held:
                votes[p] += (1 - rows / window) * votes_before[head].get(p, 0.0)
            scores = torch.full((step.seen,), -math.inf, dtype=torch.float64)
            for p, vote in votes.items():
                scores[p] = vote
            kept.append(best(scores.float(), held, budget, inside))
            votes_before[head] = {p: votes[p] for p in kept[-1]}
        return kept

    return rule


RULES = [
    (StreamingLLM(budget=9, sinks=2), streaming(9, 2)),
    (TOVA(budget=8), tova(8)),
    (KNorm(budget=8), knorm(8)),
    (SnapKV(budget=9, window=4, kernel_size=3), snapkv(9, 4)),
]


@pytest.mark.parametrize(("policy", "rule"), RULES, ids=[type(policy).__name__ for policy, _ in RULES])
def test_kept_sets(model, mode, feed, policy, rule):
    feed(model, policy, rule, mode, steps=6)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (StreamingLLM(budget=6, sinks=0), streaming(6, 0)),
        (StreamingLLM(budget=5, sinks=4), streaming(5, 4)),
        (TOVA(budget=1), tova(1)),
        (KNorm(budget=1), knorm(1)),
        (SnapKV(budget=4, window=4, kernel_size=3), snapkv(4, 4)),
        (SnapKV(budget=7, window=1, kernel_size=1), snapkv(7, 1, 1)),
        (SnapKV(budget=12, window=5, kernel_size=5, pooling="avg"), snapkv(12, 5, 5, "avg")),
        (SnapKV(budget=9, window=4, kernel_size=3, group_reduce="max"), snapkv(9, 4, reduce="max")),
        (SnapKV(budget=9, window=4, kernel_size=3, group_reduce="sum"), snapkv(9, 4, reduce="sum")),
    ],
    ids=lambda value: str(value) if isinstance(value, EvictionPolicy) else "rule",
)
def test_parameters(gqa, feed, policy, rule):
    for mode in ("padded", "turns"):
        feed(gqa, policy, rule, mode, steps=6)


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        (StreamingLLM(budget=9, sinks=2), streaming(9, 3)),
        (TOVA(budget=8), tova(9)),
        (KNorm(budget=8), lambda step: [best(step.keys.norm(dim=-1)[h], held, 8) for h, held in enumerate(step.held)]),
        (SnapKV(budget=9, window=4, kernel_size=3), snapkv(9, 4, kernel=1)),
        (SnapKV(budget=9, window=4, kernel_size=3), snapkv(9, 4, reduce="max")),
        (SnapKV(budget=9, window=4, kernel_size=3), snapkv(9, 3)),
    ],
    ids=["sinks", "budget", "sign", "kernel", "reduce", "window"],
)
def test_another_formula_is_noticed(gqa, feed, policy, wrong):
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, policy, wrong, "turns", steps=6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt_neox", "gemma3"])
def test_prompt_against_output_attentions(family):
    """transformers' own attention weights and keys, no code of this project but the cache itself."""
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")
    ids, length = random_tokens(1, 24), 24
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=True)
    expected = {"tova": {}, "snapkv": {}, "knorm": {}, "streaming_llm": {}}
    layers = [i for i in range(len(out.attentions)) if not getattr(out.past_key_values.layers[i], "is_sliding", False)]
    for layer in layers:
        weights, keys = out.attentions[layer][0], out.past_key_values.layers[layer].keys[0]
        kv_heads, everything = keys.shape[0], range(length)
        groups = weights.unflatten(0, (kv_heads, -1))
        window = range(length - 4, length)
        votes = groups[:, :, -4:, : length - 4].sum(dim=2).mean(dim=1)
        pooled = torch.stack([votes[:, max(j - 1, 0) : j + 2].amax(dim=1) for j in range(length - 4)], dim=1)
        pooled = torch.cat([pooled, torch.zeros(kv_heads, 4)], dim=1).float()
        norms = keys.float().norm(dim=-1)
        expected["tova"][layer] = [best(weights[:, -1].mean(dim=0), everything, 9)] * kv_heads
        expected["snapkv"][layer] = [best(pooled[h], everything, 9, window) for h in range(kv_heads)]
        expected["knorm"][layer] = [best(-norms[h], everything, 9) for h in range(kv_heads)]
        expected["streaming_llm"][layer] = [[0, 1, *range(length - 7, length)]] * kv_heads
    parameters = {"tova": {}, "knorm": {}, "snapkv": {"window": 4, "kernel_size": 3}, "streaming_llm": {"sinks": 2}}
    for name, sets in expected.items():
        cache = PolicyCache(model, name, budget=9, **parameters[name])
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert sets
        for layer, kept in sets.items():
            assert cache.kept_positions(layer)[0].tolist() == kept, (name, layer)
