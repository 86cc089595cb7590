"""Exceptions in the middle, threads, leaks, memory, refusals and bad values."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from policy_table import BUDGETED, EVICTING, row
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from kvpress import PolicyCache
from kvpress.errors import CacheStateError, UnsupportedModelError
from kvpress.memory import held_bytes
from kvpress.policies import SnapKV, StreamingLLM
from kvpress.testing.families import random_tokens, tiny_config, tiny_model
from kvpress.testing.policies import Scored


class Boom(RuntimeError):
    pass


class Raise(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise Boom


def run(model, cache, ids, **options):
    return model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **options)


def test_exception_between_forwards_leaves_a_cache_that_goes_on():
    model, ids = tiny_model(), random_tokens(1, 20)
    cache = PolicyCache(model, "snapkv", **row("snapkv").small)
    with pytest.raises(Boom):
        run(model, cache, ids, logits_processor=LogitsProcessorList([Raise()]))
    assert cache.seen_tokens == 20
    longer = torch.cat([ids, random_tokens(1, 5, seed=8)], dim=1)
    again = PolicyCache(model, "snapkv", **row("snapkv").small)
    with torch.no_grad():
        model(ids, past_key_values=again)
    assert torch.equal(run(model, cache, longer), run(model, again, longer))


@pytest.mark.parametrize(
    "module", ["layers.0.self_attn.o_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.1.mlp"]
)
@pytest.mark.parametrize("when", ["prompt", "decode"])
def test_exception_inside_a_forward_is_noticed_until_reset(module, when):
    model, ids = tiny_model("llama", num_hidden_layers=3), random_tokens(1, 20)
    cache = PolicyCache(model, "snapkv", **row("snapkv").small)
    if when == "decode":
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)

    def fail(*arguments):
        raise Boom

    hook = model.model.get_submodule(module).register_forward_pre_hook(fail)
    with pytest.raises(Boom), torch.no_grad():
        model(ids[:, cache.seen_tokens :], past_key_values=cache)
    hook.remove()
    for _ in range(2):  # the refusal itself changes nothing
        with pytest.raises(CacheStateError, match="reset"), torch.no_grad():
            model(random_tokens(1, 1), past_key_values=cache)
    cache.reset()
    fresh = PolicyCache(model, "snapkv", **row("snapkv").small)
    assert torch.equal(run(model, cache, ids), run(model, fresh, ids))
    assert cache.kept_positions(0).shape[-1] == row("snapkv").budget
    stock = run(model, DynamicCache(config=model.config), ids)
    assert torch.equal(stock, run(tiny_model("llama", num_hidden_layers=3), DynamicCache(), ids))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_exception_in_the_first_layer_does_not_leak_into_other_caches(family):
    """What an interrupted forward left must not be taken for another cache's, nor for a stock cache's."""
    model, ids = tiny_model(family), random_tokens(1, 20)
    expected = run(model, DynamicCache(config=model.config), ids)
    cache = PolicyCache(model, "full")
    original = type(model.model.layers[0].self_attn).forward

    def update_then_fail(key, value, layer_idx, *arguments, **kwargs):
        PolicyCache.update(cache, key, value, layer_idx)
        raise Boom

    cache.update = update_then_fail
    with pytest.raises(Boom), torch.no_grad():
        model(ids, past_key_values=cache)
    assert type(model.model.layers[0].self_attn).forward is original
    assert torch.equal(run(model, DynamicCache(config=model.config), ids), expected)
    assert torch.equal(run(model, PolicyCache(model, "full"), ids), expected)


def test_threads_do_not_see_each_other():
    model = tiny_model()
    names = [item.name for item in EVICTING]
    texts = {name: random_tokens(1, 24, seed=index) for index, name in enumerate(names)}
    alone = {name: run(model, PolicyCache(model, name, **row(name).small), texts[name]) for name in names}
    found, errors, barrier = {}, [], threading.Barrier(len(names))

    def work(name):
        try:
            cache = PolicyCache(model, name, **row(name).small)
            barrier.wait(timeout=60)
            for _ in range(3):
                cache.reset()
                found[name] = run(model, cache, texts[name])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors and set(found) == set(names)
    for name in names:
        assert torch.equal(found[name], alone[name])


def test_a_thousand_generations_leave_nothing():
    model, ids = tiny_model("llama", num_hidden_layers=1), random_tokens(1, 8)
    names = [item.name for item in BUDGETED if "not_exact_budget" not in item.promises]

    def once(index):
        name = names[index % len(names)]
        cache = PolicyCache(model, name, budget=6, **({"window": 2} if "window" in row(name).parameters else {}))
        with torch.inference_mode():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        assert cache.kept_positions(0).shape[-1] == 6
        return weakref.ref(cache)

    def live():
        gc.collect()
        return sum(1 for item in gc.get_objects() if type(item) in (torch.Tensor, PolicyCache))

    for index in range(20):
        reference = once(index)
        assert reference() is None or (gc.collect() >= 0 and reference() is None)
    before = live()
    for index in range(1_000):
        once(index)
    assert live() <= before


class Peak(TorchDispatchMode):
    """Largest sum of living storages that were made inside."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live and storage.nbytes():
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.live.pop(key, 0)


def realistic():
    return tiny_model(
        "llama",
        num_hidden_layers=6,
        hidden_size=128,
        head_dim=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=2048,
    )


@pytest.mark.parametrize("name", [item.name for item in BUDGETED if "not_exact_budget" not in item.promises])
def test_memory_is_what_is_kept(name):
    model, ids = realistic(), random_tokens(1, 600)
    cache = PolicyCache(model, name, budget=300)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        for step in range(5):
            kept = sum(int((cache.kept_positions(layer) >= 0).sum()) for layer in range(6))
            assert kept == 300 * 2 * 6
            per_token = 2 * 64 * 4 + 4 * (
                1 + len(cache.policies.eviction.columns)
            )  # keys, values, position, named columns
            rings = [layer.keeper.recent for layer in cache.policy_layers if layer.keeper.recent is not None]
            recent = sum(held_bytes(ring.tensors()) for ring in rings)  # the last queries, where a policy needs them
            assert kept * per_token <= cache.nbytes <= 1.02 * kept * per_token + recent
            assert cache.full_nbytes == (600 + step) * 2 * 6 * 2 * 64 * 4
            model(ids[:, :1], past_key_values=cache)
    report = cache.report()
    assert report.nbytes == cache.nbytes == sum(layer.nbytes for layer in report.layers)
    assert report.seen_tokens == 605 and report.to_dict()["evictions"] == 6 * 305
    assert name in str(report) and "saved" in str(report)


def test_growing_memory_is_what_is_kept():
    model, ids = realistic(), random_tokens(1, 600)
    cache = PolicyCache(model, "full")
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        for _ in range(8):
            model(ids[:, :1], past_key_values=cache)
            kept = cache.seen_tokens * 6
            size = kept * (2 * 512 + 4)  # keys and values of two heads, and their position, which is the same
            assert size <= cache.nbytes <= 1.02 * size


def test_peak_of_prefill_is_below_a_full_cache():
    model, ids = realistic(), random_tokens(1, 1_000)
    peaks = {}
    for name in ("dynamic", "snapkv", "streaming_llm", "tova"):
        cache = DynamicCache(config=model.config) if name == "dynamic" else PolicyCache(model, name, budget=64)
        with torch.no_grad(), Peak() as peak:
            model(ids, past_key_values=cache, logits_to_keep=1)
        peaks[name] = peak.peak
        del cache
    full = 6 * 1_000 * 2 * 2 * 64 * 4
    assert peaks["dynamic"] > full
    for name in ("snapkv", "streaming_llm", "tova"):
        assert peaks[name] < peaks["dynamic"] - full / 3


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"budget": 0}, "budget must be .* got 0"),
        ({"budget": -1}, "budget must be .* got -1"),
        ({"budget": float("nan")}, "budget must be .* got nan"),
        ({"budget": float("inf")}, "budget must be .* got inf"),
        ({"budget": 1.5}, "budget must be .* got 1.5"),
        ({"budget": 0.0}, "budget must be .* got 0.0"),
        ({"budget": True}, "budget must be .* got True"),
        ({"budget": "12 parsecs"}, "budget must be bytes with a unit.*'12 parsecs'"),
        ({"budget": "512"}, "budget must be bytes with a unit.*'512'"),
        ({"budget": ""}, "budget must be bytes.*''"),
        ({"budget": {"tokens": 4}}, "budget must be .*tokens"),
        ({"budget": 16}, "budget of snapkv must be at least 32 .*window=32.* got 16"),
        ({"budget": 64, "window": 0}, "window of snapkv must be an integer >= 1, got 0"),
        ({"budget": 64, "window": 4.0}, "window of snapkv must be an integer >= 1, got 4.0"),
        ({"budget": 64, "kernel_size": 4}, "kernel_size of snapkv must be odd, got 4"),
        ({"budget": 64, "pooling": "median"}, "pooling of snapkv must be one of .*'median'"),
        ({"budget": 64, "windows": 4}, "snapkv has no parameter 'windows'"),
        ({}, "snapkv needs budget"),
    ],
    ids=str,
)
def test_bad_parameters(parameters, words):
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        PolicyCache(model, "snapkv", **parameters)
    assert model.config._attn_implementation == "sdpa", "a refused cache must leave the model as it was"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("snapvk", "policy must be one of .*'snapvk'; did you mean 'snapkv'"),
        ("SnapKV", "did you mean 'snapkv'"),
        ("streaming-llm", "did you mean 'streaming_llm'"),
        ("", "policy must be one of"),
        ([], "policy must be"),
        (5, "policy must be"),
        (None, "policy must be"),
        ([SnapKV(budget=64), StreamingLLM(budget=64)], "at most one eviction policy.*snapkv.*streaming_llm"),
        ([SnapKV(budget=64), "tova"], "policy must be"),
    ],
    ids=str,
)
def test_bad_policies(policy, words):
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        PolicyCache(model, policy)
    assert model.config._attn_implementation == "sdpa"


def test_parameters_beside_an_instance():
    with pytest.raises(ValueError, match="budget"):
        PolicyCache(tiny_model(), SnapKV(budget=64), budget=12)


def test_bytes_too_few_are_refused_with_figures():
    model = tiny_model()
    cache = PolicyCache(model, "tova", budget="300B")
    with pytest.raises(ValueError, match=r"budget of 300 bytes is too small.*304|budget of 300 bytes is too small"):
        run(model, cache, random_tokens(1, 8))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), "'bloom'.*ALiBi"),
        (lambda: transformers.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4), "'mpt'.*ALiBi"),
        (
            lambda: transformers.FalconConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
            ),
            "'falcon'.*ALiBi",
        ),
        (
            lambda: transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4),
            "encoder-decoder",
        ),
        (lambda: transformers.BertConfig(), "is_decoder.*'bert' looks ahead"),
        (lambda: transformers.DeepseekV32Config(), "DSA"),
        (lambda: transformers.DiffLlamaConfig(), "'diffllama' attends twice"),
        (lambda: transformers.HrmTextConfig(), "'hrm_text' runs a layer several times"),
        (lambda: transformers.LlamaConfig(**{**tiny_config("llama").to_dict(), "use_cache": False}), "use_cache"),
    ],
    ids=["bloom", "mpt", "falcon", "t5", "bert", "deepseek_v32", "diffllama", "hrm_text", "use_cache"],
)
def test_models_that_cannot_be_right(make, words):
    with pytest.raises(UnsupportedModelError, match=words):
        PolicyCache.from_config(make(), "streaming_llm", budget=16)


def test_models_outside_the_attention_interface():
    config = transformers.XGLMConfig(vocab_size=97, d_model=32, num_layers=2, attention_heads=4, ffn_dim=32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"'xglm'.*attention interface.*from_config"):
        PolicyCache(model, "snapkv", budget=64)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_use_cache_false_is_refused(family):
    model = tiny_model(family)
    cache = PolicyCache(model, "streaming_llm", budget=16)
    with pytest.raises((UnsupportedModelError, CacheStateError), match=r"use_cache|fed again"):
        run(model, cache, random_tokens(1, 20), use_cache=False)


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_attention_changed_after_construction(other):
    model = tiny_model()
    cache = PolicyCache(model, "streaming_llm", budget=16)
    model.set_attn_implementation(other)
    with pytest.raises(UnsupportedModelError, match=f"must stay 'kvpress'.*'{other}'"):
        run(model, cache, random_tokens(1, 20))
    assert cache.seen_tokens == 0
    model.set_attn_implementation("kvpress")
    run(model, cache, random_tokens(1, 20))
    copied = copy.deepcopy(cache)
    model.set_attn_implementation(other)
    with pytest.raises(UnsupportedModelError):
        run(model, copied, random_tokens(1, 40))


def test_attention_changed_under_a_cache_made_from_a_configuration():
    model = tiny_model()
    PolicyCache(model, "full")
    cache = PolicyCache.from_config(model.config, "tova", budget=16)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match=r"'tova'.*queries"):
        run(model, cache, random_tokens(1, 20))


def test_padding_under_stock_attention_is_refused():
    model = tiny_model()
    cache = PolicyCache.from_config(model.config, "streaming_llm", budget=16)
    with pytest.raises(UnsupportedModelError, match=r"batch must be 1.*got 2"):
        run(model, cache, random_tokens(2, 20))


def test_masks_of_four_dimensions_are_refused():
    model = tiny_model()
    cache = PolicyCache(model, "streaming_llm", budget=16)
    with pytest.raises(UnsupportedModelError, match="attention_mask must be"):
        model(random_tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4), past_key_values=cache)


def test_another_text_is_noticed():
    model = tiny_model()
    cache = PolicyCache(model, "streaming_llm", budget=16)
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache)
        with pytest.raises(CacheStateError, match="position_ids must continue the 20 tokens"):
            model(random_tokens(1, 20), position_ids=torch.arange(20)[None], past_key_values=cache)


def test_another_batch_size_is_refused():
    model = tiny_model()
    cache = PolicyCache(model, "streaming_llm", budget=16)
    with torch.no_grad():
        model(random_tokens(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match=r"batch size must stay 1.* got 2"):
            model(random_tokens(2, 1), past_key_values=cache)


NAN, INF = float("nan"), float("inf")
ORDER = {  # scores by position; expected survivors of 20 tokens at budget 4
    "all_nan": (lambda p: torch.full_like(p, NAN, dtype=torch.float), [16, 17, 18, 19]),
    "all_equal": (lambda p: torch.zeros_like(p), [16, 17, 18, 19]),
    "all_inf": (lambda p: torch.full_like(p, INF, dtype=torch.float), [16, 17, 18, 19]),
    "all_minus_inf": (lambda p: torch.full_like(p, -INF, dtype=torch.float), [16, 17, 18, 19]),
    "nan_is_lowest": (lambda p: torch.where(p % 5 == 0, 0.0, NAN), [0, 5, 10, 15]),
    "inf_is_highest": (lambda p: torch.where(p == 3, INF, p.float()), [3, 17, 18, 19]),
    "minus_inf_is_lowest": (lambda p: torch.where(p > 5, -INF, -p.float()), [0, 1, 2, 3]),
    "ties": (lambda p: (p % 2).float(), [13, 15, 17, 19]),
}


@pytest.mark.parametrize("case", ORDER)
def test_order_of_strange_scores(case):
    function, expected = ORDER[case]
    model = tiny_model()
    cache = PolicyCache(model, Scored(budget=4, function=function))
    ids = random_tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :4], ids[1, :4] = 0, 0
    with torch.no_grad():
        model(ids[:, 4:], past_key_values=cache)
        assert cache.kept_positions(0).tolist() == [[expected] * 2] * 2
        cache.reset()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert cache.kept_positions(0)[1].tolist() == [expected] * 2
        out = model(ids[:, :1], past_key_values=cache)
    assert not out.logits.isnan().any()
    kept = cache.kept_positions(0)
    assert kept.shape[-1] == 4 and all(len(set(head)) == 4 for rows in kept.tolist() for head in rows)
