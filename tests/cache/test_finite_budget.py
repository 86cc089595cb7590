"""The central test: with a finite budget, logits equal a dense pass in fp64 under the mask of what the cache says that it kept."""

import copy
from functools import cache as remembered

import pytest
import torch
from policy_table import BUDGETED, EVICTING, pairs, row
from transformers import DynamicCache

from kvpress import PolicyCache
from kvpress.choice import choose_policies
from kvpress.testing.dense import Recording, Row, dense_copy, record, replay
from kvpress.testing.families import FAMILIES, random_tokens, tiny_model
from kvpress.testing.generation import WAYS, left_padded

CASES = pairs(item.name for item in EVICTING)
# Parts of these compute in fp32 whatever the model's type: softmax of sliding layers, recurrence, norms of latents
SINGLE = {"gemma2": 1e-4, "qwen3_next": 1e-4}
TOLERANCE = {**SINGLE, "deepseek_v3": 1e-5}
EVICTING_NAMES = [item.name for item in EVICTING]
BUDGETED_NAMES = [item.name for item in BUDGETED]


@remembered
def models(family):
    model = tiny_model(family, dtype=torch.float32 if family in SINGLE else torch.float64)
    return model, dense_copy(model)


class Recorder:
    """Makes caches for a way of generating and records each; a deep copy of a cache goes on with a copy of its recording."""

    def __init__(self, model, policy, **parameters):
        self.model, self.policy, self.parameters = model, policy, parameters
        self.recordings, self.caches = [], []

    def run(self, way):
        recorder = self

        class Recorded(PolicyCache):
            def __deepcopy__(self, memo):
                told = self.told
                hooks, self.hooks, self.told = self.hooks, None, None
                kept = {name: vars(self).pop(name) for name in recorder.verbs if name in vars(self)}
                copied = super().__deepcopy__(memo)
                self.hooks, self.told = hooks, told
                vars(self).update(kept)
                recorder.watch(copied, told.fork())
                return copied

        def make(model):
            cache = Recorded(model, self.policy, **self.parameters)
            self.watch(cache, None)
            return cache

        try:
            outcome = WAYS[way](self.model, make)
        finally:
            for cache in self.caches:
                cache.hooks.__exit__(None, None, None)
        return outcome

    verbs = ("crop", "batch_select_indices", "reorder_cache", "batch_repeat_interleave")

    def watch(self, cache, told):
        cache.hooks = record(self.model, cache, told)
        cache.told = cache.hooks.__enter__()
        self.caches.append(cache)
        self.recordings.append(cache.told)


def check(recordings, dense, tolerance):
    """Every row of every recording equals its dense pass, and eviction mattered."""
    rows = {recorded: None for told in recordings for recorded in told.rows}
    assert rows, "nothing was recorded"
    assert any(recorded.evicted for recorded in rows), "nothing was evicted: nothing was tested"
    matters = 0.0
    for recorded in rows:
        assert replay(dense, recorded).error(recorded) <= tolerance
        if recorded.evicted and matters < 1e-2:
            matters = max(matters, replay(dense, recorded, full=True).error(recorded))
    assert matters > 1e-2, "eviction changed no logit: nothing was tested"


@pytest.mark.parametrize(("policy", "family", "way"), CASES, ids=["-".join(case) for case in CASES])
def test_equals_dense_attention_over_kept_positions(policy, family, way):
    model, dense = models(family)
    recorder = Recorder(model, policy, **row(policy).small)
    recorder.run(way)
    check(recorder.recordings, dense, TOLERANCE.get(family, 1e-9))


@pytest.mark.parametrize("policy", BUDGETED_NAMES)
@pytest.mark.parametrize("way", ["padded_batch", "beams", "turns", "chunks_of_7"])
def test_share_of_the_prompt_makes_rows_unequal(policy, way):
    """A share gives every row of a padded batch its own budget, so heads become ragged."""
    model, dense = models("qwen3")
    recorder = Recorder(model, policy, **row(policy).parameters, budget=0.4)
    outcome = recorder.run(way)
    layer = outcome.cache.layers[0]
    assert layer.table.rows is not None, "rows are not ragged: nothing was tested"
    check(recorder.recordings, dense, 1e-9)


def _policy_and_family():
    # knorm: equal tokens have equal norms in the first layer, and rounding in fp32 would break the tie
    rotated = [(EVICTING_NAMES[f % len(EVICTING_NAMES)], family) for f, family in enumerate(FAMILIES)]
    cases = [("snapkv" if name == "knorm" and family in SINGLE else name, family) for name, family in rotated]
    return [(name, "llama") for name in EVICTING_NAMES if (name, "llama") not in cases] + cases


@pytest.mark.parametrize(("policy", "family"), _policy_and_family())
def test_padded_row_equals_the_same_prompt_alone(policy, family):
    """Before and after eviction, also for a row with one real token and one shorter than its budget."""
    model, _ = models(family)
    pads = (9, 23, 18)
    ids, mask = left_padded(pads)
    options = dict(max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
    shares = [{**row(policy).parameters, "budget": 0.4}] if policy in BUDGETED_NAMES else []
    for parameters in (row(policy).small, *shares):
        together = PolicyCache(model, policy, **parameters)
        out = model.generate(ids, attention_mask=mask, past_key_values=together, **options)
        for index, pad in enumerate(pads):
            alone = PolicyCache(model, policy, **parameters)
            single = model.generate(ids[index : index + 1, pad:], past_key_values=alone, **options)
            for a, b in zip(out.logits, single.logits, strict=True):
                assert float((a[index] - b[0]).abs().max()) <= TOLERANCE.get(family, 1e-9)
            assert torch.equal(out.sequences[index, pad:], single.sequences[0])
            for layer in [i for i, item in enumerate(alone.layers) if hasattr(item, "table")]:
                kept = together.kept_positions(layer)[index]
                own = alone.kept_positions(layer)[0]
                for head in range(kept.shape[0]):
                    assert kept[head][kept[head] >= 0].tolist() == own[head][own[head] >= 0].tolist()
                assert own.shape[-1] < alone.seen_tokens, "nothing was evicted"


@pytest.mark.parametrize("policy", [item.name for item in BUDGETED if "not_exact_budget" not in item.promises])
def test_from_cache(policy):
    """K/V of a stock cache are taken over; a policy that needs queries starts with the next token."""
    model, dense = models("gemma3")
    ids = random_tokens(1, 24)
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids[:, :-1], past_key_values=filled).logits
    cache = PolicyCache.from_cache(model, policy, filled, **row(policy).small)
    layers = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "table")]
    nothing = {layer: torch.empty(2, 0, dtype=torch.long) for layer in layers}
    told = Recording([Row().fed(ids[0, :-1].tolist(), nothing, logits[0])], 23, layers)
    if cache.policies.eviction.needs_queries:
        assert cache.kept_positions(layers[0]).shape[-1] == 23
    else:
        assert cache.kept_positions(layers[0]).shape[-1] == row(policy).budget
    with record(model, cache, told) as told:
        model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert all(cache.kept_positions(layer).shape[-1] == row(policy).budget for layer in layers)
    check([told], dense, 1e-9)


@pytest.mark.parametrize("stock_attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "policy",
    [
        name
        for name in EVICTING_NAMES
        if choose_policies(name, row(name).small).stock_refusal is None and name != "sepllm"
    ],
)
def test_from_config_under_stock_attention(policy, stock_attention):
    """Policies that need no queries under a stock attention: one row, prompt, decode steps and a second turn."""
    model = tiny_model("qwen3", dtype=torch.float64 if stock_attention == "sdpa" else torch.float32)
    dense = dense_copy(model)
    model.set_attn_implementation(stock_attention)
    cache = PolicyCache.from_config(model.config, policy, **row(policy).small)
    ids = random_tokens(1, 24)
    with record(model, cache) as told:
        out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        longer = torch.cat([out, random_tokens(1, 5, seed=9)], dim=1)
        model.generate(longer, past_key_values=cache, max_new_tokens=3, do_sample=False)
    check([told], dense, 1e-9 if stock_attention == "sdpa" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype):
    """The same kept sets are not promised, but what is kept is attended to rightly, and K/V stay in the model's type."""
    model = tiny_model("llama", dtype=dtype)
    dense = dense_copy(model)
    cache = PolicyCache(model, "snapkv", **row("snapkv").small)
    ids, mask = left_padded((0, 6))
    with record(model, cache) as told:
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)
    check([told], dense, {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype])
    for layer in cache.layers:
        assert layer.table.keys.dtype == layer.table.values.dtype == dtype
        assert all(column.dtype == torch.float32 for column in layer.table.policy_columns.values())


def test_two_caches_interleaved_on_one_model():
    model, dense = models("llama")
    names = ("snapkv", "streaming_llm")
    caches = [PolicyCache(model, name, **row(name).small) for name in names]
    texts = [random_tokens(1, 24, seed=seed) for seed in (1, 2)]
    with record(model, caches[0]) as first, record(model, caches[1]) as second, torch.no_grad():
        for start, stop in [(0, 18), *((step, step + 1) for step in range(18, 24))]:
            for cache, text in zip(caches, texts, strict=True):
                model(text[:, start:stop], past_key_values=cache)
    check([first], dense, 1e-9)
    check([second], dense, 1e-9)


def test_copies_do_not_touch_each_other():
    model, dense = models("llama")
    cache = PolicyCache(model, "snapkv", **row("snapkv").small)
    with record(model, cache) as told, torch.no_grad():
        model(random_tokens(1, 24), past_key_values=cache)
    before = [cache.layers[0].table.keys.clone(), cache.kept_positions(0)]
    copied = copy.deepcopy(cache)
    with record(model, copied, told.fork()) as own, torch.no_grad():
        for step in range(4):
            model(random_tokens(1, 1, seed=step), past_key_values=copied)
    assert torch.equal(cache.layers[0].table.keys, before[0])
    assert torch.equal(cache.kept_positions(0), before[1])
    assert cache.seen_tokens == 24 and copied.seen_tokens == 28
    check([own], dense, 1e-9)
