"""Suspicions, each a test of its own: what a cache does at the edges of its contract."""

import copy
import gc
import weakref

import pytest
import torch
from policy_table import BUDGETED, EVICTING, ROWS, row
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.errors import CacheStateError
from kvpress.policies import KNorm, SnapKV, StreamingLLM
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.generation import WAYS


def feed(model, cache, *sizes, seed=0):
    text = random_tokens(1, sum(sizes), seed=seed)
    start = 0
    with torch.no_grad():
        for size in sizes:
            out = model(text[:, start : start + size], past_key_values=cache)
            start += size
    return out.logits


@pytest.mark.parametrize("policy", [SnapKV(budget=None, window=4), KNorm(budget=None)], ids=str)
def test_no_budget_rolls_back(policy):
    """A policy with columns and no budget serves prompt lookup."""
    model = tiny_model("llama")
    expected = WAYS["prompt_lookup"](model, lambda model: DynamicCache(config=model.config))
    outcome = WAYS["prompt_lookup"](model, lambda model: PolicyCache(model, policy))
    assert outcome.error(expected) <= 1e-5


def test_copied_model_keeps_its_own_attention_for_other_layers():
    """gpt-oss has no sdpa: a copy of a model that is already switched must not serve sliding layers and stock caches by sdpa."""
    model = tiny_model("gpt_oss")
    expected = WAYS["greedy"](tiny_model("gpt_oss"), lambda model: DynamicCache(config=model.config))
    PolicyCache(model, "full")
    copied = copy.deepcopy(model)
    outcome = WAYS["greedy"](copied, lambda model: PolicyCache(model, "full"))
    assert outcome.error(expected) <= 1e-5
    stock = WAYS["greedy"](copied, lambda model: DynamicCache(config=model.config))
    assert stock.error(expected) <= 1e-5


def test_gradients_enabled_leave_no_graph_behind():
    model = tiny_model("llama")
    for name in ("snapkv", "knorm", "tova"):
        cache = PolicyCache(model, name, **row(name).small)
        text = random_tokens(1, 26)
        for start, stop in ((0, 20), (20, 21), (21, 26)):
            model(text[:, start:stop], past_key_values=cache)
            for layer in cache.policy_layers:
                assert all(not tensor.requires_grad for tensor in layer.table.tensors() if tensor is not None)
        plain = PolicyCache(model, name, **row(name).small)
        with torch.no_grad():
            for start, stop in ((0, 20), (20, 21), (21, 26)):
                model(text[:, start:stop], past_key_values=plain)
        assert torch.equal(plain.kept_positions(0), cache.kept_positions(0))


@pytest.mark.parametrize(
    "policy", [("full", {}), ("knorm", {"budget": 16}), ("tova", {"budget": 16})], ids=lambda it: it[0]
)
@pytest.mark.parametrize("first", [True, False], ids=["off after the prompt", "on after the prompt"])
def test_autocast_switched_after_the_prompt(policy, first):
    """Under autocast keys and values come in types of their own, which need not be those of the prompt's."""
    name, parameters = policy
    model, text = tiny_model("llama"), random_tokens(1, 48)
    mixed, plain = (PolicyCache(model, name, **parameters) for _ in range(2))
    with torch.no_grad():
        for start, stop in ((0, 40), *((token, token + 1) for token in range(40, 44)), (44, 48)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first == (start == 0)):
                found = model(text[:, start:stop], past_key_values=mixed).logits.float()
            expected = model(text[:, start:stop], past_key_values=plain).logits
    apart = 0.05 if name == "full" else 0.3  # rounded scores may keep another token
    assert 0 < (found - expected).abs().max() < apart * expected.abs().max()


@pytest.mark.parametrize("policy", [("full", {}), ("streaming_llm", {"budget": 100}), ("tokenselect", {"top_k": 90})])
def test_autocast_throughout(policy):
    """Nobody who reads long contexts under autocast loses more than with the stock cache, nor holds more bytes."""
    name, parameters = policy
    model, text = tiny_model("llama"), random_tokens(1, 96)

    def read(cache, mixed):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            pieces = [text[:, :80], *text[:, 80:].split(1, dim=1)]
            return torch.cat([model(piece, past_key_values=cache).logits.float() for piece in pieces], dim=1)

    exact, stock = read(DynamicCache(), False), read(DynamicCache(), True)
    cache = PolicyCache(model, name, **parameters)
    found = read(cache, True)
    error, allowed = ((each - exact).square().mean().sqrt() for each in (found, stock))
    assert 0 < error < 1.1 * allowed
    assert {layer.keys.dtype for layer in cache.policy_layers} == {torch.bfloat16}


@pytest.mark.parametrize("taken_back", [False, True])
def test_policies_score_in_the_precision_of_what_they_see(taken_back):
    """Under autocast a product of two matrices is rounded to its type, scores before a softmax too."""
    seen = []

    class Probe(KNorm):
        needs_queries = True

        def score(self, observation):
            seen.append((observation.query @ observation.query.mT).dtype)
            return super().score(observation)

    model, text = tiny_model("llama"), random_tokens(1, 40)
    cache = PolicyCache(model, Probe(budget=16))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(text[:, :30], past_key_values=cache)
        if taken_back:
            cache.activate_past_recording()
        model(text[:, 30:], past_key_values=cache)
        cache.crop(-2 if taken_back else 0)
    assert seen == [torch.float32] * 2 * len(cache.policy_layers)


def test_inference_mode_then_no_grad_then_gradients():
    model = tiny_model("llama")
    for item in EVICTING:
        cache, other = (PolicyCache(model, item.name, **item.small) for _ in range(2))
        text = random_tokens(1, 30)
        steps = [(0, 20), (20, 21), (21, 22), (22, 26), (26, 27), (27, 28)]
        modes = [
            torch.inference_mode,
            torch.inference_mode,
            torch.no_grad,
            torch.no_grad,
            torch.enable_grad,
            torch.no_grad,
        ]
        for (start, stop), mode in zip(steps, modes, strict=True):
            with mode():
                a = model(text[:, start:stop], past_key_values=cache).logits
            with torch.no_grad():
                b = model(text[:, start:stop], past_key_values=other).logits
            assert float((a.detach() - b).abs().max()) <= 1e-5  # with gradients torch may take another kernel
        assert torch.equal(cache.kept_positions(1), other.kept_positions(1))


@pytest.mark.parametrize("share", [0.3, None])
def test_nbytes_counts_every_storage(share):
    """An independent walk over everything that the cache refers to; the model's own tensors and shared mask excepted."""
    model = tiny_model("llama")
    cache = PolicyCache(model, "snapkv", window=4, kernel_size=3, budget=share or 10)
    ids = random_tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    if share:
        assert cache.policy_layers[0].table.rows is not None
    found, todo, known = {}, [cache], set()
    while todo:
        item = todo.pop()
        if id(item) in known or isinstance(item, type) or callable(item):
            continue
        known.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            continue
        if type(item).__module__.startswith("transformers") and "Config" in type(item).__name__:
            continue
        todo.extend(gc.get_referents(item))
    assert sum(found.values()) == cache.nbytes


@pytest.mark.parametrize("name", ["full", "snapkv", "h2o", "streaming_llm"])
def test_a_forward_goes_when_it_ends(name, monkeypatch):
    """With its keys, and without waiting for the collector of cycles: at long prompts that would be keys of many layers at once."""
    model = tiny_model("llama")
    cache = PolicyCache(model, name, **row(name).small)
    update, forwards = cache.update, []

    def watched(keys, values, layer_idx, *arguments, **named):
        handed = update(keys, values, layer_idx, *arguments, **named)
        forwards.append(weakref.ref(cache.layers[layer_idx].forward))
        return handed

    monkeypatch.setattr(cache, "update", watched)
    gc.disable()
    try:
        with torch.no_grad():
            for ids in (random_tokens(1, 60), random_tokens(1, 1), random_tokens(1, 5), random_tokens(1, 1)):
                model(ids, past_key_values=cache)
                assert [forward() for forward in forwards] == [None] * model.config.num_hidden_layers
                forwards.clear()
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [4_000, 4_096, 5_000, 6_144, 7_777])
@pytest.mark.parametrize("prompt", [5, 30])
@pytest.mark.parametrize("name", [item.name for item in BUDGETED if item.name not in {"adakv", "pyramidkv"}])
def test_bytes_hold_at_every_step(name, size, prompt):
    model = tiny_model("llama")
    size = size * 3 // 2 if name == "morphkv" else size  # it also holds its last queries
    parameters = {"snapkv": {"window": 2}, "streaming_llm": {"sinks": 1}}.get(name, {})
    cache = PolicyCache(model, name, budget=f"{size}B", **parameters)
    text = random_tokens(1, prompt + 25)
    with torch.no_grad():
        for start, stop in ((0, prompt), *((i, i + 1) for i in range(prompt, prompt + 12)), (prompt + 12, prompt + 25)):
            model(text[:, start:stop], past_key_values=cache)
            assert cache.nbytes <= size
    assert cache.kept_positions(0).shape[-1] < cache.seen_tokens, "nothing was evicted"
    assert cache.nbytes > size * 0.6


def test_crop_more_than_seen_is_a_state_error():
    model = tiny_model("llama")
    cache = PolicyCache(model, "full")
    feed(model, cache, 8)
    with pytest.raises(CacheStateError, match="take back 9"):
        cache.crop(-9)
    assert cache.seen_tokens == 8


def test_crop_without_recording():
    model = tiny_model("llama")
    cache = PolicyCache(model, "full")
    feed(model, cache, 8, 3)
    cache.crop(-3)
    expected = PolicyCache(model, "full")
    feed(model, expected, 8)
    assert cache.seen_tokens == 8 and torch.equal(cache.kept_positions(0), expected.kept_positions(0))
    evicting = PolicyCache(model, "streaming_llm", budget=6)
    feed(model, evicting, 12)
    for verb in (-1, -3):
        with pytest.raises(CacheStateError, match="activate_past_recording"):
            evicting.crop(verb)
    evicting.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be <= 0"):
        evicting.crop(2)


@pytest.mark.parametrize("first", [12, 5])
@pytest.mark.parametrize("lost", [0, 1, 2, 4])
@pytest.mark.parametrize("name", [item.name for item in ROWS])
def test_crop_is_exact_while_recording(name, first, lost):
    """update(a); update(b); crop(-b) and what follows equal update(a) and what follows; so does a part of b."""
    model = tiny_model("llama", dtype=torch.float64)
    text = random_tokens(1, 40)
    size = 4 if lost != 1 else 1  # a single decoded token, too
    logits = []
    for rolled_back in (True, False):
        cache = PolicyCache(model, name, **row(name).small)
        cache.activate_past_recording()
        with torch.no_grad():
            model(text[:, :first], past_key_values=cache)
            cache.crop(0)
            for at in (first, first + 1):
                model(text[:, at : at + 1], past_key_values=cache)
                cache.crop(0)
            at = first + 2
            if rolled_back:
                wrong = text[:, at : at + size].clone()
                wrong[:, size - lost :] = random_tokens(1, lost, seed=99) if lost else wrong[:, size:]
                model(wrong, past_key_values=cache)
                cache.crop(-lost)
            elif size > lost:
                model(text[:, at : at + size - lost], past_key_values=cache)
                cache.crop(0)
            at += size - lost
            assert cache.seen_tokens == at
            kept = cache.kept_positions(0), cache.kept_positions(1)
            out = [model(text[:, at + i : at + i + 1], past_key_values=cache).logits for i in range(4)]
            out.append(model(text[:, at + 4 : at + 9], past_key_values=cache).logits)
        logits.append((torch.cat(out, dim=1), kept))
    assert float((logits[0][0] - logits[1][0]).abs().max()) <= 1e-9
    assert all(torch.equal(a, b) for a, b in zip(logits[0][1], logits[1][1], strict=True))


def test_crop_of_too_much_while_recording():
    model = tiny_model("llama")
    cache = PolicyCache(model, "streaming_llm", budget=6)
    cache.activate_past_recording()
    feed(model, cache, 12)
    cache.crop(0)
    feed(model, cache, 3, seed=1)
    with pytest.raises(CacheStateError, match="cannot take back 5"):
        cache.crop(-5)
    with pytest.raises(CacheStateError):
        PolicyCache.crop(cache, -4)


def test_reset_gives_a_new_cache():
    model = tiny_model("gemma3")
    for item in ROWS:
        cache = PolicyCache(model, item.name, **item.small)
        feed(model, cache, 24, 1, 1)
        cache.reset()
        assert cache.seen_tokens == 0 and cache.kept_positions(0).numel() == 0
        assert sum(layer.table.nbytes for layer in cache.policy_layers) == 0
        a = feed(model, cache, 20, 1, 1, seed=3)
        b = feed(model, PolicyCache(model, item.name, **item.small), 20, 1, 1, seed=3)
        assert torch.equal(a, b)


def test_window_of_any_policy_is_trimmed_to_small_shares():
    """A share of a prompt of one or two tokens keeps one token at least, whatever window and sinks the policy has."""
    model = tiny_model("llama")
    for item in BUDGETED:
        for tokens in (1, 2):
            cache = PolicyCache(model, item.name, **item.parameters, budget=0.1)
            feed(model, cache, tokens, 1, 1, 1)
            assert cache.kept_positions(0).shape[-1] == 1
            assert not feed(model, cache, 2).isnan().any()


def test_huge_budget_costs_nothing():
    model = tiny_model("llama")
    cache = PolicyCache(model, StreamingLLM(budget=2**31))
    feed(model, cache, 8, 1)
    assert cache.nbytes < 2 * cache.full_nbytes


@pytest.mark.parametrize("size", [12_000, 16_384, 24_001])
@pytest.mark.parametrize("name", ["adakv", "pyramidkv"])
def test_bytes_hold_where_layers_or_heads_share_them(name, size):
    """Small columns are as long as the longest head: heads of unequal length leave less for keys and values."""
    model = tiny_model("llama")
    cache = PolicyCache(model, name, budget=f"{size}B", window=4, kernel_size=3)
    text = random_tokens(1, 150)
    with torch.no_grad():
        for start, stop in ((0, 130), *((i, i + 1) for i in range(130, 150))):
            model(text[:, start:stop], past_key_values=cache)
            assert cache.nbytes <= size
    assert cache.nbytes > size * 0.85
    if name == "adakv":
        assert cache.policy_layers[0].table.rows is not None, "heads are equally long"


def test_backward_is_refused():
    model = tiny_model("llama")
    logits = model(random_tokens(1, 20), past_key_values=PolicyCache(model, "snapkv", budget=10, window=4)).logits
    with pytest.raises(CacheStateError, match="gradients"):
        logits.sum().backward()


@pytest.mark.parametrize("name", ["full", "streaming_llm", "snapkv", "h2o", "tova"])
def test_right_padding(name):
    """A row padded behind its prompt goes on as the same prompt alone."""
    model = tiny_model("llama", dtype=torch.float64)
    parameters = (
        {} if name == "full" else {"budget": 9, **({"window": 4, "kernel_size": 3} if name == "snapkv" else {})}
    )
    text, more = random_tokens(2, 24), random_tokens(2, 6, seed=5)
    mask = torch.ones_like(text)
    mask[0, 17:] = 0
    both, alone = PolicyCache(model, name, **parameters), PolicyCache(model, name, **parameters)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(text, attention_mask=mask, position_ids=positions, past_key_values=both).logits[0, :17]
        single = model(text[:1, :17], past_key_values=alone).logits[0]
        torch.testing.assert_close(padded, single, rtol=0, atol=1e-10)
        for step in range(6):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=-1)
            positions = mask.cumsum(-1)[:, -1:] - 1
            token = more[:, step : step + 1]
            padded = model(token, attention_mask=mask, position_ids=positions, past_key_values=both).logits[0]
            single = model(token[:1], past_key_values=alone).logits[0]
            torch.testing.assert_close(padded, single, rtol=0, atol=1e-10)
    own, other = both.kept_positions(1)[:1], alone.kept_positions(1)
    assert own[..., : other.shape[-1]].tolist() == other.tolist()
    assert name == "full" or other.shape[-1] == 9 < 23


@pytest.mark.parametrize("layer_idx", [7, -1, None])
def test_a_layer_that_is_not_there(layer_idx):
    cache = PolicyCache(tiny_model("llama"), "knorm", budget=5)
    with pytest.raises(ValueError, match=rf"layer_idx must be one of \[0, 1\], got {layer_idx}"):
        cache.kept_positions(layer_idx)
