"""Budgets that differ by layer, KV head and batch row, in every way of generating; layers that share keys; stock attention."""

from functools import cache as remembered

import numpy
import pytest
import torch
import transformers

from kvpress import PolicyCache
from kvpress.errors import UnsupportedModelError
from kvpress.testing.dense import dense_copy, record, replay
from kvpress.testing.families import model_from, random_tokens, tiny_model
from kvpress.testing.generation import WAYS, left_padded
from kvpress.testing.policies import HeadBudgets, LayerBudgets, VotesByHead

POLICIES = (LayerBudgets(budget=9), HeadBudgets(budget=8), VotesByHead(budget=8), HeadBudgets(budget=0.4))
FAMILY = {"greedy": "gpt_oss", "padded_batch": "deepseek_v3", "beams": "gemma3", "turns": "qwen3", "sampling": "gemma2"}


@remembered
def models(family):
    model = tiny_model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    return model, dense_copy(model)


def check(told, dense, tolerance=1e-9):
    assert any(row.evicted for row in told.rows), "nothing was evicted: nothing was tested"
    for row in told.rows:
        assert replay(dense, row).error(row) <= tolerance
    assert max(replay(dense, row, full=True).error(row) for row in told.rows) > 1e-2


@pytest.mark.parametrize("way", [way for way in WAYS if way != "branches"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_way(policy, way):
    family = FAMILY.get(way, "llama")
    model, dense = models(family)
    recordings = []

    def make(model):
        cache = PolicyCache(model, policy)
        hooks = record(model, cache)
        recordings.append((hooks, hooks.__enter__(), cache))
        return cache

    try:
        WAYS[way](model, make)
    finally:
        for hooks, _, _ in recordings:
            hooks.__exit__(None, None, None)
    for _, told, cache in recordings:
        check(told, dense, {"gemma2": 1e-4, "deepseek_v3": 1e-5}.get(family, 1e-9))
        kept = [(cache.kept_positions(layer) >= 0).sum(dim=-1) for layer in told.layers]
        if isinstance(policy, HeadBudgets):
            single = family == "deepseek_v3"  # one latent head
            assert single or cache.policy_layers[0].table.rows is not None, "heads are not ragged"
            assert all(single or int(counts[0, 1] - counts[0, 0]) == 1 for counts in kept)
        assert int(kept[1].max() - kept[0].max()) == 1


def test_padded_row_equals_alone():
    model, _ = models("llama")
    for policy in POLICIES:
        ids, mask = left_padded((9, 0, 23))
        options = dict(max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True)
        out = model.generate(ids, attention_mask=mask, past_key_values=PolicyCache(model, policy), **options)
        for row, pad in enumerate((9, 0, 23)):
            cache = PolicyCache(model, policy)
            alone = model.generate(ids[row : row + 1, pad:], past_key_values=cache, **options)
            for a, b in zip(out.logits, alone.logits, strict=True):
                assert float((a[row] - b[0]).abs().max()) <= 1e-9
            assert cache.kept_positions(0).shape[-1] < cache.seen_tokens


def sharing_model():
    config = transformers.Gemma4TextConfig(
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        num_global_key_value_heads=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"] * 2,
        num_kv_shared_layers=3,
        initializer_range=0.2,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return model_from(config, dtype=torch.float64)


@pytest.mark.parametrize(
    "policy", [LayerBudgets(budget=9), HeadBudgets(budget=8), VotesByHead(budget=8), LayerBudgets(budget=0.4)], ids=str
)
def test_layers_that_share_keys(policy):
    """The layers that reuse keys run after their owner has evicted: they must see what it saw."""
    model = sharing_model()
    dense = dense_copy(model)
    cache = PolicyCache(model, policy)
    ids, mask = left_padded((0, 6))
    with record(model, cache) as told:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
        longer = torch.cat([out, random_tokens(2, 6, seed=9)], dim=1)
        longer_mask = torch.cat([mask, torch.ones(2, longer.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
        model.generate(longer, attention_mask=longer_mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    check(told, dense)


@pytest.mark.parametrize("stock_attention", ["sdpa", "eager"])
def test_unequal_heads_under_stock_attention_are_refused(stock_attention):
    """A stock attention would read the padding of short heads as tokens."""
    model = tiny_model("llama")
    model.set_attn_implementation(stock_attention)
    refusal = f"budgets of their own.*'{stock_attention}'.*PolicyCache"
    for policy in (HeadBudgets(budget=8), LayerBudgets(budget=8)):
        with pytest.raises(ValueError, match=refusal):
            PolicyCache.from_config(model.config, policy)
        PolicyCache(model, "full")
        cache = PolicyCache.from_config(model.config, policy)
        model.set_attn_implementation(stock_attention)
        with pytest.raises(UnsupportedModelError, match=refusal):
            model.generate(random_tokens(1, 24), past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.seen_tokens == 0


def test_policies_may_allocate_numpy_integers_and_too_little():
    class Numbers(LayerBudgets):
        def allocate(self, observation, budgets):
            return numpy.array(budgets) - 20  # a budget never empties a head

    model, dense = models("llama")
    cache = PolicyCache(model, Numbers(budget=8))
    with record(model, cache) as told:
        model.generate(random_tokens(1, 24), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.kept_positions(0).shape[-1] == 1
    check(told, dense)
