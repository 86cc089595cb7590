"""What would be silently wrong is refused by name, and nothing has changed when it was."""

import copy
import gc
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.errors import UnsupportedModelError
from kvpress.policies import Quest, Random, SepLLM
from kvpress.testing.families import random_tokens, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sliding_window": 8}, "sliding_window must be None on a compressed layer, got 8"),
        ({"position_bias": torch.zeros(1)}, "position_bias must be None"),
        ({"is_causal": False}, "is_causal must be True"),
        ({"dropout": 0.1}, r"attention dropout must be 0 .* got 0\.1: call model\.eval"),
    ],
)
def test_attention_that_this_cache_does_not_compute(given, words, monkeypatch):
    """Whatever a layer of a model hands to the attention function beside what every model does."""
    model = tiny_model()
    cache = PolicyCache(model, "streaming_llm", budget=16)
    module = transformers.models.llama.modeling_llama
    attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["kvpress"]

    def changed(*arguments, **kwargs):
        return attention(*arguments, **{**kwargs, **given})

    with monkeypatch.context() as patched:
        interface = module.ALL_ATTENTION_FUNCTIONS
        patched.setattr(interface, "get_interface", lambda name, default: changed)
        model.train("dropout" in given)
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match=words):
            model(random_tokens(1, 20), past_key_values=cache)
    cache.reset()
    model.eval()
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache)
    assert cache.kept_positions(0).shape[-1] == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "minimax"}, "'minimax' needs its own cache class"),
        ({"is_causal": False}, "is_causal of the model's configuration must be True"),
    ],
)
def test_models_whose_configuration_says_they_differ(change, words):
    config = copy.deepcopy(tiny_config("llama"))
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match=words):
        PolicyCache.from_config(config, "streaming_llm", budget=16)


def test_a_model_without_a_layer_to_compress():
    config = tiny_config("gemma3")
    config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(UnsupportedModelError, match=r"'gemma3_text' has no full-attention layer to compress"):
        PolicyCache.from_config(config, "streaming_llm", budget=16)


def test_a_stock_cache_that_lost_tokens_is_not_taken_over():
    model = tiny_model()
    full = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="layer 0 of the cache must hold all 0 tokens it has seen, it holds 0"):
        PolicyCache.from_cache(model, "knorm", full, budget=8)
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=full)
    full.layers[1].get_seq_length = lambda: 25
    with pytest.raises(ValueError, match="layer 1 of the cache must hold all 25 tokens it has seen, it holds 20"):
        PolicyCache.from_cache(model, "knorm", full, budget=8)


def test_a_cache_is_not_pickled():
    cache = PolicyCache(tiny_model(), "knorm", budget=8)
    with pytest.raises(TypeError, match=r"is not pickled: use cache\.save"):
        pickle.dumps(cache)


def test_a_cache_that_reads_token_ids_is_not_copied_without_its_model():
    model = tiny_model()
    policy = SepLLM(initial=2, separators=4, window=8, capacity=20, token_ids=(7,))
    cache = PolicyCache(model, policy)
    copy.deepcopy(cache)
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="the model of this cache is gone"):
        copy.deepcopy(cache)


def test_models_that_share_keys_between_layers_are_not_selected_from():
    config = transformers.Gemma3nTextConfig(
        **{
            key: value for key, value in tiny_config("gemma3").to_dict().items() if key in ("hidden_size", "vocab_size")
        },
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    PolicyCache.from_config(config, "streaming_llm", budget=16)
    config._attn_implementation = "kvpress"
    with pytest.raises(UnsupportedModelError, match="'gemma3n_text' shares keys between layers: quest cannot select"):
        PolicyCache.from_config(config, Quest(top_k=16))


def test_a_seed_that_torch_cannot_take():
    assert Random(budget=8, seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ValueError, match=r"seed of random must be below 2\^63"):
        Random(budget=8, seed=2**63)


def test_rows_are_chosen_by_a_mask_as_by_numbers():
    model = tiny_model()
    ids = random_tokens(3, 20)
    caches = [PolicyCache(model, "knorm", budget=8) for _ in range(2)]
    for cache in caches:
        cache.batch_select_indices(torch.tensor([0, 1]))  # nothing to choose from yet
        with torch.no_grad():
            model(ids, past_key_values=cache)
    before = caches[0].kept_positions(0)
    caches[0].batch_select_indices(torch.tensor([True, False, True]))
    caches[1].batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(caches[0].kept_positions(0), before[[0, 2]])
    assert torch.equal(caches[0].kept_positions(0), caches[1].kept_positions(0))
    assert not torch.equal(before[0], before[1])
