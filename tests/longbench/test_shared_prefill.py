"""One forward for many eviction policies: each cache, and each answer, is what its own prefill gives, bit for bit."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpress import PolicyCache
from kvpress.longbench.runner import FULL, GroupEngine, Method, ModelEngine
from kvpress.longbench.runner.shared_prefill import can_share, prefill_together
from kvpress.longbench.sample import Sample
from kvpress.policies.registry import policy_class, policy_names
from kvpress.testing.families import random_tokens, tiny_model

sys.path[:0] = [str(Path(__file__).parents[1])]
from policy_table import EVICTING, row  # noqa: E402

EVICTION = [name for name in policy_names() if policy_class(name).kind == "eviction"]
PROMPT = 40


def parameters(name):
    return row(name).small


@pytest.fixture(scope="module")
def ids():
    return random_tokens(1, PROMPT + 20, seed=5)


def tensors(state, path=""):
    """Every tensor and array of a layer's state, by its place."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}/{key}")
    elif hasattr(state, "shape"):
        yield path, torch.as_tensor(state)


def follow(model, cache, ids):
    """Logits of a later turn and of decoded tokens."""
    logits = []
    with torch.no_grad():
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, ids.shape[1]))):
            logits.append(model(ids[:, start:stop], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def test_the_table_of_policies_is_complete():
    assert sorted(EVICTION) == sorted({"full", *(item.name for item in EVICTING)})


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3", "gpt_neox"])
def test_every_policy_ends_as_after_its_own_prefill(family, ids):
    model = tiny_model(family)
    prompt, later = ids[:, :PROMPT], ids[:, PROMPT:]
    shared = [PolicyCache(model, name, **parameters(name)) for name in EVICTION]
    assert all(map(can_share, shared))
    prefilled = prefill_together(model, shared, prompt[0].tolist())
    lost, after = 0, {}
    for name, cache in zip(EVICTION, shared, strict=True):
        own = PolicyCache(model, name, **parameters(name))
        with torch.no_grad():
            logits = model(prompt, attention_mask=torch.ones_like(prompt), past_key_values=own, logits_to_keep=1)
            logits = logits.logits[0, -1]
        assert torch.equal(prefilled.logits, logits), name
        for layer, expected in zip(cache.layers, own.layers, strict=True):
            found, wanted = dict(tensors(layer.state())), dict(tensors(expected.state()))
            assert found.keys() == wanted.keys() and len(found) > 3
            for place, tensor in wanted.items():
                assert torch.equal(found[place], tensor), (name, place)
            assert torch.equal(cache.kept_positions(layer.layer_idx), own.kept_positions(layer.layer_idx))
            assert layer.seen == PROMPT and layer.forward is None
        lost += own.kept_positions(0).shape[-1] < PROMPT
        assert cache.nbytes == own.nbytes
        after[name] = follow(model, cache, later)
        assert torch.equal(after[name], follow(model, own, later)), name
    assert lost == len(EVICTING)  # all but `full` lost tokens
    assert len({logits.sum().item() for logits in after.values()}) >= len(EVICTING) - 1  # and they are not one policy


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quest", {"top_k": 8, "page_size": 4, "skip_layers": 0}),
        ("tidaldecode", {"top_k": 8, "dense_layers": 0, "reselect_layer": 1}),
    ],
)
def test_selections_for_decoded_tokens_share_too(name, options, ids):
    model = tiny_model("llama")
    prompt, later = ids[:, :PROMPT], ids[:, PROMPT:]
    shared, own = (PolicyCache(model, name, **options) for _ in range(2))
    prefilled = prefill_together(model, [PolicyCache(model, "knorm", budget=10), shared], prompt[0].tolist())
    with torch.no_grad():
        logits = model(prompt, past_key_values=own, logits_to_keep=1).logits[0, -1]
    assert torch.equal(prefilled.logits, logits)
    for layer, expected in zip(shared.layers, own.layers, strict=True):
        found, wanted = dict(tensors(layer.state())), dict(tensors(expected.state()))
        assert found.keys() == wanted.keys() and layer.selector is not None
        assert all(torch.equal(found[place], tensor) for place, tensor in wanted.items())
    dense = follow(model, PolicyCache(model, "full"), torch.cat([prompt, later], dim=1))[:, PROMPT:]
    assert torch.equal(found_logits := follow(model, shared, later), follow(model, own, later))
    assert not torch.allclose(found_logits, dense)  # tokens were left out
    assert torch.equal(shared.selected_positions(1), own.selected_positions(1))


def test_caches_hold_nothing_of_each_other(ids):
    model = tiny_model("llama")
    caches = [PolicyCache(model, "full"), PolicyCache(model, "knorm", budget=10), PolicyCache(model, "full")]
    prefill_together(model, caches, ids[0, :PROMPT].tolist())
    storages = [layer.table.keys.untyped_storage().data_ptr() for cache in caches for layer in cache.layers]
    assert len(set(storages)) == len(storages) == 6
    before = caches[2].layers[0].table.keys.clone()
    follow(model, caches[0], ids[:, PROMPT:])
    assert torch.equal(caches[2].layers[0].table.keys, before)


def test_sabotage_a_policy_that_observes_too_late_is_noticed(ids, monkeypatch):
    """The comparison would see a follower that is told of the queries of another layer."""
    from kvpress.longbench.runner import shared_prefill

    model = tiny_model("llama")
    finish = shared_prefill._LeadLayer.finish

    def shifted(self, forward, query, keys, arguments):
        finish(self, forward, query.roll(1, dims=2), keys, arguments)

    monkeypatch.setattr(shared_prefill._LeadLayer, "finish", shifted)
    cache, own = (PolicyCache(model, "tova", budget=10) for _ in range(2))
    prefill_together(model, [cache], ids[0, :PROMPT].tolist())
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=own)
    assert not torch.equal(cache.kept_positions(1), own.kept_positions(1))


def test_what_cannot_share(ids):
    llama, gemma = tiny_model("llama"), tiny_model("gemma3")
    for cache in (
        PolicyCache(llama, "tokenselect", top_k=16),
        PolicyCache(llama, "streaming_llm", budget=10, positions="reindex"),
        PolicyCache(gemma, "snapkv", budget=40),
        FULL.make_cache(llama),
    ):
        assert not can_share(cache)
        with pytest.raises(ValueError, match="caches must be empty, and attend to all of a prompt"):
            prefill_together(llama, [cache], [1, 2, 3])
    used = PolicyCache(llama, "knorm", budget=10)
    prefill_together(llama, [used], [1, 2, 3])
    with pytest.raises(ValueError, match="caches must be empty,"):
        prefill_together(llama, [used], [1, 2, 3])
    with pytest.raises(ValueError, match="ids must hold at least 2 tokens, not 1"):
        prefill_together(llama, [PolicyCache(llama, "knorm", budget=10)], [1])


METHODS = [
    FULL,
    Method("streaming_llm", 24),
    Method("snapkv", 0.25, {"window": 4, "kernel_size": 3}),
    Method("adakv", 0.25, {"window": 4, "kernel_size": 3}),
    Method("h2o", 0.25),
    Method("quest", None, {"top_k": 16, "page_size": 4}),
    Method("streaming_llm", 24, {"positions": "reindex"}),
]


def questions(count, **changes):
    sample = Sample("t", "s", "The same long context goes here. " * 6, "", " Answer:", ("x",), "qa_f1", 7)
    return [replace(sample, sample_id=f"s{i}", question=f" Question {i}?", **changes) for i in range(count)]


def texts(answers):
    return {
        (method.label, sample.sample_id): (
            answer.prediction,
            answer.new_tokens,
            answer.prompt_tokens,
            answer.cache_bytes,
        )
        for method, sample, answer in answers
    }


def one_by_one(engine, batch):
    for method in METHODS:
        for (sample, _), answer in zip(batch, engine.answers(method, batch), strict=True):
            yield method, sample, answer


@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("changes", [{}, {"max_new_tokens": 1}, {"stop_at_newline": True}, {"context": ""}])
def test_answers_in_a_group_equal_those_one_by_one(query_aware, changes, model, tokenizer, encoder):
    batch = [(sample, encoder.encode(sample)) for sample in questions(2, **changes)]
    options = {"query_aware": query_aware}
    alone = texts(one_by_one(ModelEngine(model, tokenizer, **options), batch))
    group = texts(GroupEngine(model, tokenizer, **options).answers_of(METHODS, batch))
    assert group == alone and len(alone) == 2 * len(METHODS)
    assert len({prediction for prediction, *_ in alone.values()}) > 1 or changes == {"max_new_tokens": 1}


@pytest.mark.parametrize("query_aware", [True, False])
def test_a_group_reads_the_prompt_once(query_aware, model, tokenizer, encoder):
    batch = [(sample, encoder.encode(sample)) for sample in questions(1)]
    read = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, given: read.append(given[0].shape[1])
    )
    try:
        list(GroupEngine(model, tokenizer, query_aware=query_aware).answers_of(METHODS[1:5], batch))
        assert len([tokens for tokens in read if tokens > 20]) == 1
        read.clear()
        list(GroupEngine(model, tokenizer, query_aware=query_aware, chunk_size=16).answers_of(METHODS[1:3], batch))
        assert max(read) <= 16  # chunks are every method's own
    finally:
        handle.remove()
