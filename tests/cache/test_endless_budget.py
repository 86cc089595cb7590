"""A budget that is never reached gives what `DynamicCache` gives: every policy, family and way of generating."""

import os
from functools import cache as remembered

import pytest
import torch
from policy_table import ROWS, row
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.testing.families import FAMILIES, tiny_model
from kvpress.testing.generation import CORE, ROLLING_BACK, WAYS, Outcome

EVERYTHING = os.environ.get("KVPRESS_TEST_EVERYTHING") == "1"
NAMES = [item.name for item in ROWS]
RECURRENT = ("qwen3_next",)


def cases():
    """Every policy with every family, every family with every way, every policy with every core way; all of it by environment."""
    for f, family in enumerate(FAMILIES):
        for w, way in enumerate(WAYS):
            if family in RECURRENT and way in ROLLING_BACK:
                continue
            for p, policy in enumerate(NAMES):
                wanted = (f + w) % len(NAMES) == p or (family == "llama" and way in CORE)
                if wanted or EVERYTHING:
                    yield pytest.param(policy, family, way, id=f"{policy}-{family}-{way}")


@remembered
def model_of(family: str):
    return tiny_model(family)


@remembered
def stock(family: str, way: str) -> Outcome:
    return WAYS[way](tiny_model(family), lambda model: DynamicCache(config=model.config))


@pytest.mark.parametrize(("policy", "family", "way"), cases())
def test_equals_dynamic_cache(policy, family, way):
    expected = stock(family, way)
    outcome = WAYS[way](model_of(family), lambda model: PolicyCache(model, policy, **row(policy).endless))
    assert outcome.error(expected) <= 1e-5
    assert outcome.cache.seen_tokens == expected.cache.get_seq_length()
    layers = [index for index, layer in enumerate(outcome.cache.layers) if hasattr(layer, "policy")]
    assert layers, "no layer was compressed: nothing was tested"
    for layer in layers:
        assert outcome.cache.kept_positions(layer).shape[-1] > 20


def test_all_pairs_are_covered():
    chosen = [case.values for case in cases()]
    assert {(policy, family) for policy, family, _ in chosen} == {(p, f) for p in NAMES for f in FAMILIES}
    assert {way for *_, way in chosen} == set(WAYS)


@pytest.mark.parametrize("stock_attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", NAMES)
def test_from_config_under_stock_attention_equals_dynamic_cache(policy, stock_attention):
    model = tiny_model("qwen3")
    model.set_attn_implementation(stock_attention)
    make = {**row(policy).endless}
    probe = PolicyCache.from_config
    if policy in {"snapkv", "tova"}:
        with pytest.raises(ValueError, match=f"policy '{policy}' needs queries.*'{stock_attention}'"):
            probe(model.config, policy, **make)
        return
    for way in ("greedy", "beams", "prompt_lookup", "chunks_of_3", "turns", "branches"):
        expected = WAYS[way](model, lambda model: DynamicCache(config=model.config))
        if way in ("beams", "chunks_of_3", "turns") and policy != "full":
            continue  # several rows: refused, see test_refusals
        outcome = WAYS[way](model, lambda model: probe(model.config, policy, **make))
        assert outcome.error(expected) <= 1e-5
        assert model.config._attn_implementation == stock_attention


@pytest.mark.parametrize("policy", NAMES)
def test_from_cache_equals_dynamic_cache(policy):
    from kvpress.testing.generation import left_padded

    model = tiny_model("gemma3")
    ids, mask = left_padded((0, 6))
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=filled)
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
