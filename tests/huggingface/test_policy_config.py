"""Policies as a file beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpress.errors import CacheFormatError
from kvpress.policies import H2O, KNorm, Quest, SepLLM, SnapKV, make_policy, policy_names
from kvpress.policies.registry import describe_policies
from kvpress.policy_config import PolicyConfig


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_comes_back(name: str, tmp_path: Path) -> None:
    required = {
        row.name: [key for key, value in row.parameters.items() if value == "required"] for row in describe_policies()
    }
    config = PolicyConfig.of(name, **dict.fromkeys(required[name], 64))
    config.save_pretrained(tmp_path / "new" / "folder")
    assert PolicyConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert config.policies == (make_policy(name, **dict.fromkeys(required[name], 64)),)


def test_the_file_is_plain_and_says_what_it_is(tmp_path: Path) -> None:
    policies = (SepLLM(initial=2, separators=8, window=16, capacity=60, token_ids=(5, 7)), Quest(top_k=64))
    PolicyConfig(policies).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "policy_config.json").read_text("utf-8"))
    assert (data["_type"], data["_version"]) == ("kvpress_policies", 1)
    assert [item["name"] for item in data["policies"]] == ["sepllm", "quest"]
    assert PolicyConfig.from_pretrained(tmp_path).policies == policies
    budgets = PolicyConfig.of(KNorm(budget=(8, (4, 0.5))))
    assert PolicyConfig.from_dict(json.loads(json.dumps(budgets.to_dict()))) == budgets
    assert PolicyConfig.of([SnapKV(budget=64), Quest()]).policies == (SnapKV(budget=64), Quest())


GOOD = PolicyConfig.of(H2O(budget=64)).to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "_type": "other"}, "_type of a policy configuration must be 'kvpress_policies', got 'other'"),
        ({**GOOD, "_version": 2}, "_version of a policy configuration must be 1, got 2"),
        ({**GOOD, "_version": True}, "_version"),
        ({key: value for key, value in GOOD.items() if key != "_version"}, "_version .* got None"),
        ({**GOOD, "policies": {"name": "h2o"}}, "must be a list"),
        ({**GOOD, "policies": [{"budget": 4}]}, "with names"),
        ({**GOOD, "policies": [{"name": "h2o"}]}, "budget"),
        ([], "must hold an object"),
    ],
)
def test_what_is_damaged_is_named(data: Any, message: str, tmp_path: Path) -> None:
    assert PolicyConfig.from_dict(GOOD).policies == (H2O(budget=64),)
    (tmp_path / "policy_config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CacheFormatError, match=message):
        PolicyConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([{"name": "h2oo", "budget": 4}], "did you mean 'h2o'"),
        ([{"name": "h2o", "budget": 4, "windows": 3}], "windows"),
        ([{"name": "h2o", "budget": 0}], "budget"),
        ([{"name": "h2o", "budget": 4}, {"name": "tova", "budget": 4}], "at most one eviction policy"),
        ([], "policy must be"),
    ],
)
def test_what_is_no_cache_is_refused(policies: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig.from_dict({**GOOD, "policies": policies})


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"policy_config\.json"):
        PolicyConfig.from_pretrained(tmp_path)
    (tmp_path / "policy_config.json").write_text("[" * 5 + "x", encoding="utf-8")
    with pytest.raises(CacheFormatError, match="damaged"):
        PolicyConfig.from_pretrained(tmp_path)
