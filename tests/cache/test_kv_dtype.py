"""Keys and values stored in fewer bytes: every policy does what it does with the rounded numbers, and holds what it says."""

import math
from functools import cache as remembered

import pytest
import torch
from policy_table import EVICTING, ROWS, row
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvpress import PolicyCache
from kvpress.memory import held_bytes
from kvpress.policies import Quest, TidalDecode, TokenSelect, make_policy
from kvpress.row_format import KV_DTYPES, Int8Rows, RowFormat, row_format
from kvpress.testing.families import model_from, random_tokens, tiny_config, tiny_model
from kvpress.testing.generation import CORE, WAYS

SELECTING = {
    "tokenselect keep": TokenSelect(top_k=6, sinks=2, local=4, chunk=4, tail=3, positions="keep"),
    "tokenselect reindex": TokenSelect(top_k=6, sinks=2, local=4, chunk=4, tail=3),
    "quest": Quest(top_k=12, page_size=4, skip_layers=0),
    "tidaldecode": TidalDecode(top_k=8, dense_layers=0, reselect_layer=2),
}


# Numbers that differ in their last bits may be rounded to different levels. So a model of several layers computes in fp64; one layer,
# whose keys are the same bits whatever attends to them, runs the fp32 kernels.
MODELS = {"fp64": (3, torch.float64), "one layer": (1, torch.float32)}


@remembered
def model_of(name):
    config = tiny_config("llama")
    config.num_hidden_layers, dtype = MODELS[name]
    return model_from(config, dtype=dtype)


def rounded(states: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """The numbers that a cache in `kv_dtype` stands for, by the rule in words: 127 levels on each side of 0, one scale a row."""
    if kv_dtype != "int8":
        return states.to(getattr(torch, kv_dtype)).to(states.dtype)
    scale = states.float().abs().max(dim=-1, keepdim=True).values / 127
    return (torch.round(states.float() / scale) * scale).nan_to_num(0.0).to(states.dtype)


class RoundedLayer(DynamicLayer):
    """A stock layer that rounds what it has, but shows a first prompt as it came."""

    kv_dtype = "int8"

    def update(self, key_states, value_states, *args, **kwargs):
        first = not self.is_initialized
        keys, values = rounded(key_states, self.kv_dtype), rounded(value_states, self.kv_dtype)
        everything = super().update(keys, values, *args, **kwargs)
        return (key_states, value_states) if first else everything


def rounded_stock(model, kv_dtype):
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = type("Layer", (RoundedLayer,), {"kv_dtype": kv_dtype})()
    return cache


@pytest.mark.parametrize("way", CORE)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_full_cache_equals_a_stock_cache_with_rounded_keys(name, kv_dtype, way):
    outcome = WAYS[way](model_of(name), lambda model: PolicyCache(model, "full", kv_dtype=kv_dtype))
    expected = WAYS[way](model_of(name), lambda model: rounded_stock(model, kv_dtype))
    exact = WAYS[way](model_of(name), lambda model: DynamicCache(config=model.config))
    assert outcome.error(expected) <= 1e-5
    assert outcome.error(exact) > 1e-5, "nothing was rounded"


class WrongScale(Int8Rows):
    """Sabotage: one part in a thousand too large."""

    def parts(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, scale = super().parts(stored)
        return rows, scale * 1.001


def test_a_wrong_scale_is_found():
    def sabotaged(model):
        cache = PolicyCache(model, "full", kv_dtype="int8")
        for layer in cache.policy_layers:
            layer.form = WrongScale()
            layer.reset()
        return cache

    expected = WAYS["greedy"](model_of("one layer"), lambda model: rounded_stock(model, "int8"))
    assert WAYS["greedy"](model_of("one layer"), sabotaged).error(expected) > 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek_v3", "gpt_oss"])
def test_of_other_families(family):
    model = tiny_model(family, dtype=torch.float64)
    outcome = WAYS["padded_batch"](model, lambda model: PolicyCache(model, "full", kv_dtype="int8"))
    expected = WAYS["padded_batch"](model, lambda model: rounded_stock(model, "int8"))
    assert outcome.error(expected) <= 1e-5


class RoundTrip(RowFormat):
    """Stores the numbers that another format stands for, as they are: what that format's scales must amount to."""

    def __init__(self, kv_dtype: str) -> None:
        self.kv_dtype = kv_dtype

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        return rounded(rows, self.kv_dtype)


def round_trip(model, policy, kv_dtype):
    cache = PolicyCache(model, policy)
    for layer in cache.policy_layers:
        layer.form = RoundTrip(kv_dtype)
        layer.reset()
    return cache


# keys of equal tokens are equal before rotation: their votes tie, and the kernels' last bits would decide
NAMES = [*(item.name for item in EVICTING), *SELECTING]
CASES = [("fp64", name, way) for name in NAMES for way in ("padded_batch", "turns")]
CASES += [("one layer", name, way) for name in NAMES for way in CORE if name != "tokenselect reindex"]
CASES = [case for case in CASES if case[:2] != ("one layer", "tidaldecode")]  # its first layer attends to everything


@pytest.mark.parametrize(("of", "name", "way"), CASES)
def test_a_policy_does_what_it_does_with_rounded_numbers(of, name, way):
    policy = SELECTING[name] if name in SELECTING else make_policy(name, **row(name).small)
    outcome = WAYS[way](model_of(of), lambda model: PolicyCache(model, policy, kv_dtype="int8"))
    expected = WAYS[way](model_of(of), lambda model: round_trip(model, policy, "int8"))
    assert outcome.error(expected) <= 2e-5
    sets = "selected_positions" if name in SELECTING else "kept_positions"
    layers = range(len(outcome.cache.layers))
    for layer in layers:
        assert torch.equal(getattr(outcome.cache, sets)(layer), getattr(expected.cache, sets)(layer))
    narrowed = [getattr(outcome.cache, sets)(layer).shape[-1] < outcome.cache.seen_tokens for layer in layers]
    assert any(narrowed), "nothing was evicted, or everything selected"


def test_reindexed_selection_by_the_kernels():
    model, ids = model_of("one layer"), (torch.randperm(80, generator=torch.Generator().manual_seed(3)) + 3)[None]
    policy = SELECTING["tokenselect reindex"]
    caches = [PolicyCache(model, policy, kv_dtype="int8"), round_trip(model, policy, "int8")]
    for first, last in ((0, 40), (40, 41), (41, 50), (50, 51), (51, 52)):
        with torch.no_grad():
            given, expected = (model(ids[:, first:last], past_key_values=cache).logits for cache in caches)
        assert float((given - expected).abs().max()) <= 1e-5
        assert torch.equal(*(cache.selected_positions(0) for cache in caches))
        assert caches[0].selected_positions(0).shape[-1] < last


@pytest.mark.parametrize("name", [item.name for item in ROWS])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_bytes(name, kv_dtype):
    model, ids = tiny_model(), random_tokens(2, 40)
    caches = [PolicyCache(model, name, kv_dtype=kind, **row(name).small) for kind in (None, kv_dtype)]
    for cache in caches:
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    plain, narrow = (cache.report() for cache in caches)
    assert narrow.full_nbytes == plain.full_nbytes
    assert narrow.kv_dtype == kv_dtype and plain.kv_dtype is None
    assert (f"in {kv_dtype}" in str(narrow)) and "in int8" not in str(plain)
    dim, size = 8, {"int8": 12, "bfloat16": 16, "float16": 16}[kv_dtype]
    rows = []
    for cache in caches:
        tables = [layer.table for layer in cache.policy_layers]
        rows.append(held_bytes(tensor for table in tables for tensor in (table.keys, table.values)))
    assert rows[1] * 4 * dim == rows[0] * size


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_models_own_type_changes_nothing(kind):
    model = tiny_model(dtype=kind)
    name = str(kind).removeprefix("torch.")
    for policy in ("full", "snapkv", "adakv"):
        outcomes = [
            WAYS["turns"](model, lambda m, given=given, p=policy: PolicyCache(m, p, kv_dtype=given, **row(p).small))
            for given in (None, name)
        ]
        assert outcomes[0].error(outcomes[1]) == 0


def test_a_budget_of_bytes_buys_more_tokens():
    model, ids = tiny_model(), random_tokens(1, 200)
    kept = []
    for kv_dtype in (None, "int8"):
        cache = PolicyCache(model, "streaming_llm", budget="20KB", kv_dtype=kv_dtype)
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert cache.nbytes <= 20_000
        kept.append(cache.kept_positions(0).shape[-1])
    assert 2 * kept[0] < kept[1] < 200


@pytest.mark.parametrize("name", ["full", "snapkv", "adakv"])
def test_saved_and_loaded(name, tmp_path):
    model, ids = tiny_model(), random_tokens(1, 30)
    cache = PolicyCache(model, name, kv_dtype="int8", **row(name).small)
    with torch.no_grad():
        model(ids[:, :28], past_key_values=cache)
        cache.save(tmp_path / "saved")
        again = PolicyCache.load(tmp_path / "saved", model)
        assert again.kv_dtype == "int8" and again.nbytes <= cache.nbytes * 1.1
        outputs = [model(ids[:, 28:29], past_key_values=each).logits for each in (cache, again)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("attention", ["sdpa", "kvpress"])
def test_without_a_model_and_from_a_stock_cache(attention):
    model, ids = tiny_model(), random_tokens(1, 30)
    model.set_attn_implementation("sdpa")
    stock, expected = DynamicCache(config=model.config), rounded_stock(model, "int8")
    with torch.no_grad():
        model(ids[:, :20], past_key_values=stock)
        model(ids[:, :20], past_key_values=expected)
        if attention == "sdpa":
            cache = PolicyCache.from_config(model.config, "full", kv_dtype="int8")
            model(ids[:, :20], past_key_values=cache)
        else:
            cache = PolicyCache.from_cache(model, "full", stock, kv_dtype="int8")
        for step in range(20, 24):
            outputs = [model(ids[:, step : step + 1], past_key_values=each).logits for each in (cache, expected)]
            assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-5
    assert cache.kv_dtype == "int8"


def test_numbers_that_are_hard_to_store():
    form = row_format("int8")
    rows = torch.randn(3, 2, 50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 50)[:, None]
    rows[0, 0, 0] = 0
    error = (form.unpack(form.pack(rows), torch.float32) - rows).abs()
    assert bool((error <= rows.abs().amax(dim=-1, keepdim=True) / 254 * (1 + 1e-5)).all())
    assert float(error[0, 0, 0].max()) == 0 and float(error.max()) > 0
    assert form.unpack(form.pack(rows), torch.bfloat16).dtype == torch.bfloat16
    half = row_format("float16")
    assert float(half.pack(torch.tensor([1e30, -1e30])).abs().max()) == torch.finfo(torch.float16).max
    lost = form.unpack(form.pack(torch.full((1, 4), math.nan)), torch.float32)
    assert bool(lost.isnan().all()), "what was not a number must not become one"


def test_refusals():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"kv_dtype must be None or one of .*got 'int4'"):
        PolicyCache(model, "full", kv_dtype="int4")
    with pytest.raises(ValueError, match="multiples of 4, got 6"):
        row_format("int8").pack(torch.zeros(1, 6))
