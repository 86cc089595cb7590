"""Keyformer: sums of softmax under noise and temperature, from the dense weights."""

from __future__ import annotations

import math

import pytest
import torch

from kvpress.cache import PolicyCache
from kvpress.kernels.attention_mass.noise import gumbel
from kvpress.policies import H2O, Keyformer
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.kept_sets import Rule, best


def keyformer(
    budget: int, steps: int, recent: float = 0.3, tau_init: float = 1.0, tau_end: float = 2.0, seed: int | None = 0
) -> Rule:
    def rule(step):
        query_heads, new, tokens = step.weights.shape
        tau = tau_init + min(step.decoded, steps) / steps * (tau_end - tau_init)
        scores = step.weights.log()  # less a constant of the row, which the softmax takes away
        if seed is not None:
            counter = (seed + (step.layer + 1) * 0x9E3779B97F4A7C15) % 2**63
            heads = torch.arange(query_heads)[:, None, None]
            scores = scores + gumbel(counter, heads, torch.arange(tokens - new, tokens)[:, None], torch.arange(tokens))
        gained = (scores / tau).softmax(dim=-1).sum(dim=1).unflatten(0, (len(step.held), -1)).mean(dim=1)
        sums = step.state.setdefault("sums", [torch.zeros(0, dtype=torch.float64) for _ in step.held])
        window = range(step.seen - math.floor(recent * budget + 1e-9), step.seen)
        kept = []
        for head, held in enumerate(step.held):
            total = gained[head].clone()
            total[: len(sums[head])] += sums[head]
            kept.append(best(total, held, budget, window))
            total[sorted(set(held) - set(kept[-1]))] = 0
            sums[head] = total
        return kept

    return rule


def test_kept_sets(model, mode, feed):
    feed(model, Keyformer(budget=10, steps=8), keyformer(10, 8), mode)


@pytest.mark.parametrize(
    "policy, rule",
    [
        (Keyformer(budget=10, steps=30, seed=7), keyformer(10, 30, seed=7)),
        (Keyformer(budget=10, steps=3, tau_init=0.5, tau_end=4), keyformer(10, 3, 0.3, 0.5, 4)),
        (Keyformer(budget=10, recent=0.8, noise=None), keyformer(10, 128, 0.8, seed=None)),
    ],
    ids=["seed", "temperature", "no noise"],
)
def test_parameters(gqa, feed, policy, rule):
    for mode in ("padded", "chunks", "turns"):
        feed(gqa, policy, rule, mode)


@pytest.mark.parametrize(
    "wrong", [keyformer(10, 8, seed=1), keyformer(10, 8, seed=None), keyformer(10, 8, tau_init=4.0)]
)
def test_another_formula_is_noticed(gqa, feed, wrong):
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, Keyformer(budget=10, steps=8), wrong, "turns")


def decode(model, policy, seed=0, batch=1):
    ids = random_tokens(batch, 60, seed=seed)
    cache = PolicyCache(model, policy)
    kept, columns = [], []
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        for step in range(30, 60):
            model(ids[:, step : step + 1], past_key_values=cache)
            kept.append([cache.kept_positions(layer).tolist() for layer in range(2)])
            columns.append(cache.policy_layers[1].table.policy_columns["attention"].clone())
    return kept, columns


def test_without_noise_it_is_h2o():
    """Exactly: the same sums, to the bit."""
    model = tiny_model("llama")
    plain = decode(model, Keyformer(budget=12, recent=0.5, noise=None, tau_init=1, tau_end=1))
    h2o = decode(model, H2O(budget=12))
    noisy = decode(model, Keyformer(budget=12, recent=0.5))
    assert plain[0] == h2o[0] != noisy[0]
    assert all(torch.equal(own, other) for own, other in zip(plain[1], h2o[1], strict=True))


def test_seeds():
    model = tiny_model("llama")
    first, again, other = (decode(model, Keyformer(budget=12, seed=seed))[0] for seed in (3, 3, 4))
    assert first == again != other
    policy = Keyformer(budget=12, seed=2**63 - 1)
    assert len({policy.noise_seed(layer) for layer in range(100)}) == 100
    assert all(0 <= policy.noise_seed(layer) < 2**63 for layer in range(100))


def test_temperature_schedule():
    policy = Keyformer(budget=12, tau_init=1.0, tau_end=3.0, steps=4)
    assert [policy.temperature(step) for step in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert Keyformer(budget=12).temperature(128) == 2.0


def test_steps_of_the_generation_configuration():
    model = tiny_model("llama")
    assert PolicyCache(model, Keyformer(budget=12)).policies.eviction.steps is None
    model.generation_config.max_new_tokens = 40
    assert PolicyCache(model, Keyformer(budget=12)).policies.eviction.steps == 40
    assert PolicyCache(model, Keyformer(budget=12, steps=7)).policies.eviction.steps == 7


def test_rows_decoded_at_once_have_their_own_temperatures():
    """Tokens that an assistant guessed, fed in one forward, score as if fed one by one."""
    model, ids = tiny_model("llama", dtype=torch.float64), random_tokens(1, 36)
    caches = [PolicyCache(model, Keyformer(budget=64, steps=6, tau_end=5.0)) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :30], past_key_values=cache)
        caches[0].activate_past_recording()
        model(ids[:, 30:], past_key_values=caches[0])
        caches[0].crop(-2)
        for step in range(30, 34):
            model(ids[:, step : step + 1], past_key_values=caches[1])
    for own, other in zip(caches[0].policy_layers, caches[1].policy_layers, strict=True):
        assert own.keeper.decoded == other.keeper.decoded == 4
        torch.testing.assert_close(
            own.table.policy_columns["attention"], other.table.policy_columns["attention"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recent": 2}, "recent of keyformer must be a share"),
        ({"tau_init": 0}, "tau_init of keyformer must be a number above 0"),
        ({"tau_end": float("nan")}, "tau_end of keyformer must be a number above 0"),
        ({"noise": "gaussian"}, "noise of keyformer must be one of"),
        ({"seed": -1}, "seed of keyformer must be an integer >= 0"),
        ({"steps": 0}, "steps of keyformer must be an integer >= 1"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Keyformer(budget=8, **arguments)
