"""Token ids for policies that need them: right in every way of calling the model, and no hook left behind."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from transformers import DynamicCache

from kvpress.cache import PolicyCache
from kvpress.errors import MissingTokenIdsError
from kvpress.policies import SepLLM
from kvpress.testing.families import random_tokens, tiny_model

POLICY = SepLLM(initial=1, separators=2, window=3, capacity=64, token_ids=(5, 6, 7))


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def stored(cache, row=0):
    """The ids of a row's tokens by position, out of every layer and head."""
    found = set()
    for layer in cache.policy_layers:
        table = layer.table
        ids, positions = table.policy_columns["token_id"][row], table.positions[row]
        for head in range(positions.shape[0]):
            pairs = sorted(
                (position, int(token))
                for position, token in zip(positions[head].tolist(), ids[head].tolist(), strict=True)
                if position >= 0
            )
            found.add(tuple(token for _, token in pairs))
    assert len(found) == 1
    return list(found.pop())


def test_chunks_and_decode():
    model, ids = tiny_model("llama"), random_tokens(1, 30)
    cache = PolicyCache(model, POLICY)
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 20), (20, 21), (21, 22), (22, 30)):
            model(ids[:, start:stop], past_key_values=cache)
    assert stored(cache) == ids[0].tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_generate(arguments):
    model = tiny_model("llama")
    ids = random_tokens(1, 6).repeat(1, 3)
    torch.manual_seed(0)
    cache = PolicyCache(model, POLICY)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=9, **{"do_sample": False, **arguments})
    seen = stored(cache)
    assert seen[:18] == ids[0].tolist() and len(seen) == cache.seen_tokens
    rows = out[:, : len(seen)].tolist()
    if "num_beams" not in arguments:  # the best beam need not be the first of the last step
        assert seen == rows[0]
    assert len(seen) >= 26


def test_assistant_model():
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1, num_hidden_layers=1)
    ids = random_tokens(1, 18)
    cache = PolicyCache(model, POLICY)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False, assistant_model=assistant)
    assert stored(cache) == out[0, : cache.seen_tokens].tolist()
    assert cache.seen_tokens >= 24


def test_left_padding():
    model, ids = tiny_model("llama"), random_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = PolicyCache(model, POLICY)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert stored(cache, 0) == ids[0, 4:].tolist()
    assert stored(cache, 1) == ids[1].tolist()


def test_inputs_embeds_is_refused():
    model, ids = tiny_model("llama"), random_tokens(1, 8)
    embeddings = model.get_input_embeddings()(ids)
    cache = PolicyCache(model, POLICY)
    with torch.no_grad():
        model(ids)  # ids of the same shape, of another forward
        for call in (model, model.model):
            with pytest.raises(MissingTokenIdsError, match=r"input_ids \[1, 8\] are needed"):
                call(inputs_embeds=embeddings, past_key_values=cache)
        model(ids, past_key_values=cache)  # nothing broke
    assert stored(cache) == ids[0].tolist()


def test_hooks_go_with_the_last_cache():
    model, ids = tiny_model("llama"), random_tokens(1, 8)
    assert hooks(model) == 0
    first = PolicyCache(model, POLICY)
    added = hooks(model)
    assert added == 2
    second = PolicyCache(model, POLICY)
    third = copy.deepcopy(second)
    assert hooks(model) == added
    del first, second
    gc.collect()
    assert hooks(model) == added
    with torch.no_grad():
        model(ids, past_key_values=third)
    assert stored(third) == ids[0].tolist()
    del third
    gc.collect()
    assert hooks(model) == 0


def test_policies_that_need_none_set_no_hook():
    model = tiny_model("llama")
    cache = PolicyCache(model, "streaming_llm", budget=16)
    assert cache is not None and hooks(model) == 0


def test_copies_go_their_own_ways():
    model, ids = tiny_model("llama"), random_tokens(1, 20)
    cache = PolicyCache(model, POLICY)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        twin = copy.deepcopy(cache)
        model(ids[:, 12:16], past_key_values=cache)
        model(ids[:, 16:20], past_key_values=twin)
    assert stored(cache) == ids[0, :16].tolist()
    assert stored(twin) == ids[0, :12].tolist() + ids[0, 16:].tolist()


def test_threads_do_not_see_each_other():
    model = tiny_model("llama")
    caches = [PolicyCache(model, POLICY) for _ in range(4)]
    texts = [random_tokens(1, 40, seed=index) for index in range(4)]
    failures: list[Exception] = []

    def work(cache, ids):
        try:
            with torch.no_grad():
                for start in range(0, 40, 4):
                    model(ids[:, start : start + 4], past_key_values=cache)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(caches, texts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for cache, ids in zip(caches, texts, strict=True):
        assert stored(cache) == ids[0].tolist()


def test_two_models_in_turn():
    models = [tiny_model("llama"), tiny_model("qwen2", seed=1)]
    caches = [PolicyCache(model, POLICY) for model in models]
    ids = random_tokens(2, 16)
    with torch.no_grad():
        for start in (0, 5, 11):
            stop = {0: 5, 5: 11, 11: 16}[start]
            for index in (0, 1):
                models[index](ids[index : index + 1, start:stop], past_key_values=caches[index])
    assert [stored(cache) for cache in caches] == ids.tolist()


def test_without_a_model_or_its_tokens():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="needs token ids, which only a model shows"):
        PolicyCache.from_config(model.config, POLICY)
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(1, 8), past_key_values=filled)
    with pytest.raises(ValueError, match="needs the ids of all tokens"):
        PolicyCache.from_cache(model, POLICY, filled)
