"""H2O: sums of attention over every row, from the dense weights."""

from __future__ import annotations

import math

import pytest
import torch

from kvpress.cache import PolicyCache
from kvpress.policies import H2O
from kvpress.testing.families import random_tokens
from kvpress.testing.kept_sets import Rule, best


def h2o(budget: float, recent: float = 0.5, normalize: bool = False, decay: float = 1.0) -> Rule:
    def rule(step):
        sums = step.state.setdefault("sums", [torch.zeros(0, dtype=torch.float64) for _ in step.held])
        kept = []
        limit = budget if isinstance(budget, int) else max(1, math.floor(budget * step.prompt + 1e-9))
        window = range(step.seen - math.floor(recent * limit + 1e-9), step.seen)
        for head, held in enumerate(step.held):
            total = torch.zeros(step.seen, dtype=torch.float64)
            total[: len(sums[head])] = sums[head]
            for row in step.grouped()[head]:
                total = decay * total + row
            sums[head] = total
            score = total.clone()
            if normalize:
                score /= torch.tensor([sum(decay**k for k in range(step.seen - j)) for j in range(step.seen)])
            kept.append(best(score, held, limit, window))
            gone = sorted(set(held) - set(kept[-1]))
            sums[head][gone] = 0
        return kept

    return rule


def test_kept_sets(model, mode, feed):
    feed(model, H2O(budget=10), h2o(10), mode)


@pytest.mark.parametrize(
    "policy, rule",
    [
        (H2O(budget=9, recent=0.0), h2o(9, 0.0)),
        (H2O(budget=9, recent=1.0), h2o(9, 1.0)),
        (H2O(budget=10, recent=0.29), h2o(10, 0.29)),
        (H2O(budget=10, normalize=True), h2o(10, normalize=True)),
        (H2O(budget=10, decay=0.8), h2o(10, decay=0.8)),
        (H2O(budget=10, normalize=True, decay=0.8), h2o(10, normalize=True, decay=0.8)),
        (H2O(budget=0.5), h2o(0.5)),
        (H2O(budget=1), h2o(1)),
    ],
    ids=lambda value: str(value) if isinstance(value, H2O) else "rule",
)
def test_parameters(gqa, feed, policy, rule):
    for mode in ("padded", "chunks", "turns"):
        feed(gqa, policy, rule, mode)


@pytest.mark.parametrize("wrong", [h2o(10, recent=0.3), h2o(10, decay=0.9), h2o(10, normalize=True)])
def test_another_formula_is_noticed(gqa, feed, wrong):
    with pytest.raises(AssertionError, match="the rule keeps"):
        feed(gqa, H2O(budget=10), wrong, "turns")


def test_sums_are_of_all_rows(gqa):
    """A prompt of n rows hands out n of weight, whatever was padded."""
    ids = random_tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = PolicyCache(gqa, H2O(budget=64))
    with torch.no_grad():
        gqa(input_ids=ids, attention_mask=mask, past_key_values=cache)
    sums = cache.policy_layers[0].table.policy_columns["attention"].sum(dim=-1)
    torch.testing.assert_close(sums, torch.tensor([15.0, 20.0])[:, None].expand_as(sums))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budget": 8, "recent": 1.5}, r"recent of h2o must be a share in \[0, 1\], got 1.5"),
        ({"budget": 8, "recent": float("nan")}, "recent of h2o"),
        ({"budget": 8, "decay": 0.0}, r"decay of h2o must be in \(0, 1\]"),
        ({"budget": 8, "normalize": 1}, "normalize of h2o"),
        ({"budget": 0}, "budget must be"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        H2O(**arguments)
