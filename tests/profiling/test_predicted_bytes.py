"""Bytes computed from a configuration against bytes of storages, for every registered policy on two models."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvpress import PolicyCache
from kvpress.choice import choose_policies
from kvpress.errors import UnsupportedModelError
from kvpress.policies import (
    H2O,
    AdaKV,
    Full,
    KNorm,
    Quest,
    SepLLM,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    make_policy,
    policy_names,
)
from kvpress.policies.base import Policy
from kvpress.profiling.cache_bytes import cache_bytes
from kvpress.profiling.context import weights_bytes
from kvpress.profiling.predict import grown_slots, policy_bytes, stock_bytes
from kvpress.profiling.shape import ModelShape, read_shape
from kvpress.row_format import KV_DTYPES
from kvpress.testing.families import FAMILIES, random_tokens, tiny_config, tiny_model

BATCH, BUDGET = 2, 40
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wide": ("llama", {"head_dim": 64}),
    "deep": ("mistral", {"head_dim": 32, "num_key_value_heads": 4, "num_hidden_layers": 3}),
}
PARAMETERS: dict[str, dict[str, Any]] = {  # so that prompts of 100 tokens lose some, and selections select
    "full": {},
    "snapkv": {"budget": BUDGET, "window": 8},
    "pyramidkv": {"budget": BUDGET, "window": 8, "beta": 4},
    "adakv": {"budget": BUDGET, "window": 8},
    "morphkv": {"budget": BUDGET, "window": 8},
    "sepllm": {"initial": 2, "separators": 8, "window": 16, "capacity": 40, "token_ids": tuple(range(5, 97, 6))},
    "tokenselect": {"top_k": 16, "sinks": 2, "local": 8, "chunk": 8, "tail": 4},
    "quest": {"top_k": 32, "skip_layers": 1},
    "tidaldecode": {"top_k": 16, "dense_layers": 0, "reselect_layer": 1},
}
WAYS = ((100, 1), (100, 9), (30, 30), (20, 4))  # tokens of the prompt, new ones: past the budget at once, later, never


@cache
def model_and_shape(name: str) -> tuple[PreTrainedModel, ModelShape]:
    family, changes = MODELS.get(name, (name, {}))
    model = tiny_model(family, **changes)
    return model, read_shape(model.config)


def held(model: PreTrainedModel, held_by: Any, prompt: int, new: int, batch: int = BATCH) -> int:
    ids = random_tokens(batch, prompt, seed=1)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=held_by,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    return cache_bytes(held_by).held_bytes


def error(name: str, policy: Policy, prompt: int, new: int, kv_dtype: str | None = None) -> float:
    """Predicted against measured, as a share. The few bytes that depend on the kernels at hand count as none."""
    model, shape = model_and_shape(name)
    measured = held(model, PolicyCache(model, policy, kv_dtype=kv_dtype), prompt, new)
    off = policy_bytes(shape, choose_policies(policy, {}), prompt, new - 1, BATCH, kv_dtype) - measured
    notes = 16 * BATCH * sum(layer.kv_heads for layer in shape.compressed)
    return 0.0 if -notes <= off <= 0 else off / measured


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_predicted(name: str, model: str) -> None:
    policy = make_policy(name, **PARAMETERS.get(name, {"budget": BUDGET}))
    errors = [error(model, policy, prompt, new) for prompt, new in WAYS]
    exact = 0.03 if name == "adakv" else 0.0  # heads that share by need: the rest is exact to the byte
    assert max(map(abs, errors)) <= exact, errors


@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(budget=0.3),
        SnapKV(budget="200kB", window=8),
        H2O(budget=BUDGET, interval=7),
        KNorm(budget=(40, 20)),
        KNorm(budget=((40, 16), 0.5)),
        SnapKV(budget=((40, 16), (12, 30)), window=4),
        StreamingLLM(budget=BUDGET, positions="reindex"),
        SepLLM(initial=2, separators=8, window=16, capacity=60, token_ids=()),
        Quest(top_k=200),
        Quest(top_k=32, page_size=8, skip_layers=0),
        TokenSelect(top_k=16, sinks=2, local=8, chunk=8, tail=4, positions="keep", threshold=2.0),
    ],
    ids=repr,
)
def test_every_form_of_a_budget_is_predicted(policy: Policy) -> None:
    errors = [error("wide", policy, prompt, new) for prompt, new in ((100, 1), (100, 9), (20, 4))]
    assert errors == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    "policy", [Full(), SnapKV(budget=BUDGET, window=8), StreamingLLM(budget="200kB"), Quest(top_k=32)], ids=repr
)
def test_every_type_of_storage_is_predicted(policy: Policy, kv_dtype: str) -> None:
    errors = [error("wide", policy, prompt, new, kv_dtype) for prompt, new in ((200, 1), (200, 9))]
    assert errors == [0.0, 0.0]


def test_bytes_shared_by_need_are_predicted() -> None:
    for name in MODELS:
        errors = [error(name, AdaKV(budget="300kB", window=8), prompt, new) for prompt, new in ((200, 1), (200, 6))]
        assert max(map(abs, errors)) <= 0.03, errors


def test_both_kinds_of_policies_at_once() -> None:
    model, shape = model_and_shape("wide")
    policies = [SnapKV(budget=60, window=8), Quest(top_k=32, skip_layers=0)]
    measured = held(model, PolicyCache(model, policies), 100, 5)
    assert policy_bytes(shape, choose_policies(policies, {}), 100, 4, BATCH) == pytest.approx(
        measured, abs=16 * 2 * 2 * BATCH
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_every_family_is_that_of_its_model(family: str) -> None:
    model, shape = model_and_shape(family)
    assert shape.weights_bytes == weights_bytes(model)
    batch = 1 if family == "qwen3_next" else BATCH
    stock = DynamicCache(config=model.config)
    measured = held(model, stock, 60, 5, batch)
    assert stock_bytes(shape, 60, 4, batch) == pytest.approx(measured, rel=0.005)
    ours = held(model, PolicyCache(model, "snapkv", budget=24, window=8), 60, 5, batch)
    predicted = policy_bytes(shape, choose_policies("snapkv", {"budget": 24, "window": 8}), 60, 4, batch)
    assert predicted == pytest.approx(ours, rel=0.005)
    assert predicted < stock_bytes(shape, 60, 4, batch)


def test_nothing_is_loaded() -> None:
    """405 billion parameters: no machine of ours holds them."""
    config = tiny_config("llama")
    config.update({"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "vocab_size": 128256})
    config.update({"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 53248})
    shape = read_shape(config, torch.bfloat16)
    assert shape.weights_bytes == pytest.approx(2 * 405.85e9, rel=1e-3)
    assert stock_bytes(shape, 1000, 0) == 2 * 126 * 8 * 128 * 2 * 1000


def test_the_type_is_the_one_asked_for_else_the_configurations() -> None:
    config = tiny_config("llama")
    single = read_shape(config)
    assert single.dtype == torch.float32
    half = read_shape(config, torch.bfloat16)
    assert half.weights_bytes < 0.6 * single.weights_bytes
    config.dtype = torch.float16
    assert read_shape(config).dtype == torch.float16


def test_what_follows_the_text_is_refused() -> None:
    _, shape = model_and_shape("wide")
    endless = SepLLM(initial=2, separators=None, window=16, capacity=40, token_ids=(5,))
    with pytest.raises(ValueError, match="depends on the text"):
        policy_bytes(shape, choose_policies(endless, {}), 100, 0)
    with pytest.raises(ValueError, match="too small"):
        policy_bytes(shape, choose_policies(KNorm(budget="10B"), {}), 100, 0)
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        from transformers import BloomConfig

        read_shape(BloomConfig())


def test_a_growing_table_has_its_room() -> None:
    assert grown_slots(1000, 0, None) == 1015
    assert grown_slots(1000, 15, None) == 1015
    assert grown_slots(1000, 16, None) == 1016 + 15
    assert grown_slots(1000, 16, 1017) == 1017
    assert grown_slots(100, 0, None) == 132
    assert grown_slots(8, 0, None) == 12


def test_a_wrong_prediction_is_noticed() -> None:
    """The comparison above is no tautology: another budget, another policy, another length are off by more than 3 %."""
    model, shape = model_and_shape("wide")
    measured = held(model, PolicyCache(model, AdaKV(budget=BUDGET, window=8)), 100, 5)
    right = policy_bytes(shape, choose_policies(AdaKV(budget=BUDGET, window=8), {}), 100, 4, BATCH)
    assert abs(right / measured - 1) < 0.03
    for wrong in (AdaKV(budget=BUDGET + 2, window=8), KNorm(budget=BUDGET - 2)):
        assert abs(policy_bytes(shape, choose_policies(wrong, {}), 100, 4, BATCH) / measured - 1) > 0.03
