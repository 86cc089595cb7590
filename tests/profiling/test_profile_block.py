"""`kvpress.profile` around a user's own script."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyCache
from kvpress.offload.options import Offload
from kvpress.profiling.cache_bytes import cache_bytes
from kvpress.profiling.cuda_snapshot import memory_history
from kvpress.profiling.phases import PhaseRecorder
from kvpress.testing.families import random_tokens, tiny_model

PROMPT, NEW, BATCH = 60, 7, 2


def generate(model: torch.nn.Module, cache: object, **more: object) -> None:
    ids = random_tokens(BATCH, PROMPT)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **more}
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)  # type: ignore[operator]


def storages(cache: PolicyCache) -> int:
    """Bytes by another way than the cache's: every tensor reachable from its layers, storages once."""
    found, seen, waiting = {}, set(), list(cache.layers)
    skipped = ("Rotation", "TokenClock", "TokenIds", "module", "function")
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif type(item).__module__.startswith("kvpress") and type(item).__name__ not in skipped:
            waiting += vars(item).values()
    return sum(found.values())


@pytest.mark.parametrize(("policy", "options"), [("snapkv", {"budget": 24, "window": 8}), ("full", {})])
def test_phases_bytes_and_times(policy: str, options: dict[str, int]) -> None:
    model = tiny_model()
    cache = PolicyCache(model, policy, **options)
    with kvpress.profile(model) as profile:
        generate(model, cache)
    assert (profile.batch, profile.prefill.forwards, profile.prefill.tokens) == (BATCH, 1, BATCH * PROMPT)
    assert (profile.decode.forwards, profile.decode.tokens) == (NEW - 1, BATCH * (NEW - 1))
    assert profile.cache is not None and profile.prefilled is not None and profile.first_token_seconds is not None
    assert profile.cache.held_bytes == cache.nbytes == storages(cache)
    assert sum(layer.held_bytes for layer in profile.cache.layers) == cache.nbytes
    seen = PROMPT + NEW - 1
    token = 2 * 2 * 8 * 4  # keys and values, KV heads, dim, fp32
    kept = seen if policy == "full" else 24
    assert profile.cache.logical_bytes == 2 * BATCH * kept * token
    assert profile.cache.full_bytes == cache.full_nbytes == 2 * BATCH * seen * token
    assert [layer.kept_tokens for layer in profile.cache.layers] == [kept, kept]
    assert profile.prefill.seconds > 0 and profile.decode.seconds > 0
    assert profile.first_token_seconds >= profile.prefill.seconds
    assert profile.token_milliseconds == pytest.approx(1000 * profile.decode.seconds / (NEW - 1))
    assert profile.resident_method == "sampled"
    assert profile.prefill.resident_peak_bytes >= profile.prefill.resident_before_bytes > 0  # type: ignore[operator]
    assert profile.weights_bytes == sum(parameter.numel() * 4 for parameter in model.parameters()) + sum(
        buffer.numel() * buffer.element_size() for buffer in model.buffers()
    )
    json.dumps(profile.to_dict())
    assert "prefill" in str(profile) and "a full cache" in str(profile)


def test_bytes_of_each_tier_are_told(tmp_path: Path) -> None:
    model = tiny_model()
    offload = Offload(device="28KB", disk=str(tmp_path), block=8)
    cache = PolicyCache(model, "full", offload=offload)
    with kvpress.profile(model) as profile:
        generate(model, cache)
    assert profile.cache is not None
    assert profile.cache.tiers == {tier.tier: tier.nbytes for tier in cache.report().tiers}
    assert list(profile.cache.tiers) == ["device", "disk"]
    assert 0 < profile.cache.tiers["device"] <= 28_000 and profile.cache.tiers["disk"] > 8_000
    assert "tiers: " in str(profile) and " disk" in str(profile)
    cache.close()


def test_the_stock_cache_is_measured_too() -> None:
    model = tiny_model("gemma3")
    with kvpress.profile(model) as profile:
        output = model(random_tokens(1, 40), use_cache=True)
    assert isinstance(output.past_key_values, DynamicCache)
    assert profile.cache is not None
    sliding = profile.cache.layers[1]
    assert (sliding.kind, sliding.kept_tokens) == ("DynamicSlidingWindowLayer", 15)
    assert sliding.held_bytes > sliding.logical_bytes == 2 * 15 * 2 * 8 * 4
    assert profile.cache.layers[0].logical_bytes == profile.cache.layers[0].full_bytes == 2 * 40 * 2 * 8 * 4
    assert profile.first_token_seconds is not None and profile.token_milliseconds is None


def test_chunks_of_a_prompt_are_prefill() -> None:
    model = tiny_model()
    with kvpress.profile(model) as profile:
        generate(model, PolicyCache(model, "streaming_llm", budget=24), prefill_chunk_size=25)
    assert (profile.prefill.forwards, profile.prefill.tokens) == (3, BATCH * PROMPT)
    assert profile.decode.forwards == NEW - 1


def test_hooks_are_gone_after_the_block_however_it_ends() -> None:
    model = tiny_model()
    hooks = (len(model._forward_hooks), len(model._forward_pre_hooks))
    with pytest.raises(RuntimeError, match="broke off"), kvpress.profile(model) as profile:
        generate(model, None)
        raise RuntimeError("broke off")
    assert profile.decode.forwards == NEW - 1
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_blocks_nest() -> None:
    model = tiny_model()
    with kvpress.profile(model, exact_peaks=True) as outer:
        generate(model, None)
        with kvpress.profile(model, exact_peaks=True) as inner:
            generate(model, None)
    assert (outer.prefill.forwards, inner.prefill.forwards) == (2, 1)
    assert (outer.decode.forwards, inner.decode.forwards) == (2 * (NEW - 1), NEW - 1)


def test_a_block_without_a_forward() -> None:
    with kvpress.profile(tiny_model()) as profile:
        pass
    assert profile.cache is None and profile.first_token_seconds is None and profile.token_milliseconds is None
    assert "Profile" in str(profile)


def test_time_is_told_apart() -> None:
    """A clock that the model's forwards move: 10 s a prompt, 1 s a token, and 0.25 s between forwards."""
    model = tiny_model()
    now = [100.0]
    recorder = PhaseRecorder(model, exact=False, clock=lambda: now[0])
    recorder.open()
    cache = DynamicCache(config=model.config)
    handle = model.model.register_forward_hook(  # inside the measured forward
        lambda module, args, kwargs, output: now.__setitem__(0, now[0] + (10 if output[0].shape[1] > 1 else 1)),
        with_kwargs=True,
    )
    with torch.no_grad():
        for rows in (30, 1, 1, 20, 1):
            now[0] += 0.25
            model(random_tokens(1, rows), past_key_values=cache, use_cache=True)
    handle.remove()
    recorder.close()
    assert recorder.phases["prefill"].seconds == 20
    assert (
        recorder.phases["decode"].seconds == 3 * 1.25
    )  # choosing the token counts, waiting for the next turn does not
    assert recorder.first_token_seconds == 0.25 + 10 + 0.25
    assert (recorder.phases["prefill"].tokens, recorder.phases["decode"].tokens) == (50, 3)


def test_a_forward_without_tokens_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match="input_ids or inputs_embeds"), kvpress.profile(model):
        model(input_ids=None)


def test_embeddings_are_tokens_too() -> None:
    model = tiny_model()
    with kvpress.profile(model) as profile:
        model(inputs_embeds=torch.zeros(3, 5, 32))
    assert (profile.batch, profile.prefill.tokens) == (3, 15)


def test_a_cache_without_layers_is_refused() -> None:
    with pytest.raises(TypeError, match="made of layers"):
        cache_bytes(object())


def test_an_empty_cache_holds_nothing() -> None:
    found = cache_bytes(PolicyCache(tiny_model(), "full"))
    assert (found.logical_bytes, found.held_bytes, found.full_bytes) == (0, 0, 0)


def test_a_snapshot_needs_cuda_and_a_new_file(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="cuda_snapshot needs a model on a CUDA device"),
        kvpress.profile(tiny_model(), cuda_snapshot="snapshot.pickle"),
    ):
        pass
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *a, **k: calls.append(("record", k)))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(("dump", path)))
    file = f"{tmp_path}/deep/snapshot.pickle"
    with memory_history(torch.device("cuda:0"), file):
        assert [call[0] for call in calls] == ["record"]
    assert calls[1] == ("dump", file)
    assert calls[2] == ("record", {"enabled": None})
    open(file, "wb").close()  # noqa: PTH123
    with pytest.raises(ValueError, match="must name a new file"), memory_history(torch.device("cuda:0"), file):
        pass
