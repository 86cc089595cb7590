"""A policy is added at run time, by its class or by name of module and class."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvpress import PolicyCache
from kvpress.policies import KNorm, SnapKV, describe_policies, register_policy, registry
from kvpress.testing.families import random_tokens, tiny_model


@dataclass(frozen=True)
class Newest(KNorm):
    name: ClassVar[str] = "newest"

    def score(self, observation):
        return observation.positions.float()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))


def test_a_class_is_registered_and_used_by_name():
    register_policy("newest", Newest)
    register_policy("newest", Newest)  # again is no error
    assert describe_policies()[-1].class_name == "Newest"
    model = tiny_model("llama")
    cache = PolicyCache(model, "newest", budget=5)
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache)
    assert cache.kept_positions(0)[0, 0].tolist() == [15, 16, 17, 18, 19]


def test_a_class_may_come_by_name():
    register_policy("votes", "kvpress.policies.snapkv:SnapKV")
    assert registry.policy_class("votes") is SnapKV
    register_policy("snapkv", SnapKV)  # the class that has the name already


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"'snapkv' is taken by kvpress.policies.snapkv:SnapKV"):
        register_policy("snapkv", Newest)
