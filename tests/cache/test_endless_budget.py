"""A budget that is never reached gives what `DynamicCache` gives: every policy, family and way of generating."""

from functools import cache as remembered

import pytest
import torch
from policy_table import ROWS, pairs, row
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.choice import choose_policies
from kvpress.testing.families import FAMILIES, tiny_model
from kvpress.testing.generation import CORE, WAYS, Outcome, left_padded

NAMES = [item.name for item in ROWS]
CASES = pairs(NAMES)


@remembered
def model_of(family: str):
    return tiny_model(family)


@remembered
def stock(family: str, way: str) -> Outcome:
    return WAYS[way](tiny_model(family), lambda model: DynamicCache(config=model.config))


@pytest.mark.parametrize(("policy", "family", "way"), CASES, ids=["-".join(case) for case in CASES])
def test_equals_dynamic_cache(policy, family, way):
    expected = stock(family, way)
    outcome = WAYS[way](model_of(family), lambda model: PolicyCache(model, policy, **row(policy).endless))
    assert outcome.error(expected) <= 1e-5
    assert outcome.cache.seen_tokens == expected.cache.get_seq_length()
    layers = [index for index, layer in enumerate(outcome.cache.layers) if hasattr(layer, "table")]
    assert layers, "no layer was compressed: nothing was tested"
    for layer in layers:
        assert outcome.cache.kept_positions(layer).shape[-1] > 20


def test_all_pairs_are_covered():
    assert {(policy, family) for policy, family, _ in CASES} == {(p, f) for p in NAMES for f in FAMILIES}
    assert {(policy, way) for policy, _, way in CASES} >= {(p, w) for p in NAMES for w in CORE}
    assert all(len({policy for policy, _, way in CASES if way == wanted}) >= len(NAMES) // 3 for wanted in WAYS)
    families = [f for f in FAMILIES if f != "qwen3_next"]
    assert {(family, way) for _, family, way in CASES} >= {(f, w) for f in families for w in CORE}


@pytest.mark.parametrize("stock_attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", NAMES)
def test_from_config_under_stock_attention_equals_dynamic_cache(policy, stock_attention):
    model = tiny_model("qwen3")
    model.set_attn_implementation(stock_attention)
    make = {**row(policy).endless}
    probe = PolicyCache.from_config
    if policy == "sepllm" or choose_policies(policy, make).stock_refusal is not None:
        with pytest.raises(ValueError, match=f"policy '{policy}' (needs|gives).*use PolicyCache"):
            probe(model.config, policy, **make)
        return
    for way in ("greedy", "beams", "prompt_lookup", "chunks_of_3", "turns", "branches"):
        expected = WAYS[way](model, lambda model: DynamicCache(config=model.config))
        if way in ("beams", "chunks_of_3", "turns") and policy != "full":
            continue  # several rows: refused, see test_refusals
        outcome = WAYS[way](model, lambda model: probe(model.config, policy, **make))
        assert outcome.error(expected) <= 1e-5
        assert model.config._attn_implementation == stock_attention


@pytest.mark.parametrize("policy", [name for name in NAMES if name != "sepllm"])  # token ids are not in a stock cache
def test_from_cache_equals_dynamic_cache(policy):
    model = tiny_model("gemma3")
    ids, mask = left_padded((0, 6))
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, past_key_values=filled)
    cache = PolicyCache.from_cache(model, policy, filled, attention_mask=mask[:, :-1], **row(policy).endless)
    assert cache.seen_tokens == ids.shape[1] - 1
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, expected.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(out.logits, expected.logits, strict=True)) <= 1e-5
