"""Ways of feeding a cache that every policy's kept sets are compared in."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvpress.cache import PolicyCache
from kvpress.policies import Policy
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.kept_sets import KeptSets, Rule

sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]  # vote_rules, policy_table
torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)

HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
MODES = ("plain", "padded", "chunks", "beams", "turns")


@pytest.fixture(params=list(HEADS))
def model(request: pytest.FixtureRequest):
    return tiny_model("llama", dtype=torch.float64, num_key_value_heads=HEADS[request.param])


@pytest.fixture
def gqa():
    return tiny_model("llama", dtype=torch.float64)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


Feed = Callable[..., KeptSets]


@pytest.fixture
def feed() -> Feed:
    """`feed(model, policy, rule, mode)`: kept sets compared after every forward of that mode."""

    def feed(
        model, policy: Policy, rule: Rule, mode: str = "plain", *, prompt: int = 24, steps: int = 10, seed: int = 1
    ) -> KeptSets:
        batch = {"padded": 3, "beams": 2}.get(mode, 1)
        ids = random_tokens(batch, prompt + 2 * steps + 9, seed=seed)
        mask = torch.ones_like(ids)
        if mode == "padded":
            mask[0, : prompt // 3], mask[2, :1] = 0, 0
        with KeptSets(model, PolicyCache(model, policy), rule) as sets:
            cuts = [0, 3, 10, 11, prompt] if mode == "chunks" else [0, prompt]
            for start, stop in itertools.pairwise(cuts):
                sets.feed(ids[:, start:stop], mask[:, start:stop])
            for step in range(prompt, prompt + steps):
                if mode == "beams" and step % 4 == 1:
                    sets.reorder(torch.tensor([1, 1] if step % 8 == 1 else [1, 0]))
                sets.feed(ids[:, step : step + 1])
            if mode == "turns":
                turn = prompt + steps
                sets.feed(ids[:, turn : turn + 9])
                for step in range(turn + 9, turn + 9 + steps):
                    sets.feed(ids[:, step : step + 1])
        assert sets.evicted >= steps
        return sets

    return feed
