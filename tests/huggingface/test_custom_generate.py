"""`model.generate(..., custom_generate=…, policy=…)`, and the pipeline on top of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from kvpress import PolicyCache
from kvpress.huggingface import CUSTOM_GENERATE
from kvpress.policies import Quest, SnapKV
from kvpress.policy_config import PolicyConfig
from kvpress.testing.tiny_checkpoint import tiny_model, tiny_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "text_generation_pipeline.py"
PROMPT = "The lighthouse keeper wrote a letter every week. " * 4
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
CUSTOM: dict[str, Any] = {"custom_generate": CUSTOM_GENERATE, "trust_remote_code": True}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies remote code into a folder of the user's; here into one of the test's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def inputs() -> dict[str, torch.Tensor]:
    return dict(tiny_tokenizer()(PROMPT, return_tensors="pt", return_token_type_ids=False))


@pytest.mark.parametrize(
    "given",
    [
        {"policy": "snapkv", "budget": 40, "window": 8},
        {"policy": SnapKV(budget=40, window=8)},
        {"policy": [SnapKV(budget=40, window=8)]},
        {"policy": PolicyConfig.of("snapkv", budget=40, window=8).to_dict()},
    ],
    ids=["name", "instance", "list", "dictionary"],
)
def test_it_is_generate_with_a_fresh_cache(given: dict[str, Any]) -> None:
    model = tiny_model()
    cache = PolicyCache(model, SnapKV(budget=40, window=8))
    expected = model.generate(**inputs(), past_key_values=cache, **SETTINGS)
    found = model.generate(**inputs(), **CUSTOM, **given, **SETTINGS)
    assert torch.equal(found.sequences, expected.sequences)
    ours = found.past_key_values
    assert isinstance(ours, PolicyCache)
    assert ours.policies.eviction == SnapKV(budget=40, window=8)
    assert ours.nbytes == cache.nbytes < cache.full_nbytes / 2
    again = model.generate(**inputs(), **CUSTOM, **given, **SETTINGS)
    assert again.past_key_values is not ours
    assert torch.equal(again.sequences, expected.sequences)


def test_the_type_of_storage_goes_to_the_cache() -> None:
    found = tiny_model().generate(
        **inputs(), **CUSTOM, policy="snapkv", budget=40, window=8, kv_dtype="int8", **SETTINGS
    )
    assert found.past_key_values.kv_dtype == "int8"


def test_generates_own_settings_stay_generates() -> None:
    model = tiny_model()
    found = model.generate(**inputs(), **CUSTOM, policy=Quest(top_k=64), top_k=3, **{**SETTINGS, "do_sample": True})
    assert found.past_key_values.policies.selection == Quest(top_k=64)
    with pytest.raises(ValueError, match=r"top_k is a setting of generate .* policy=Quest\(top_k=…\)"):
        model.generate(**inputs(), **CUSTOM, policy="quest", top_k=64, **SETTINGS)


def test_what_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="policy must be given"):
        model.generate(**inputs(), **CUSTOM, **SETTINGS)
    with pytest.raises(ValueError, match="must be left out"):
        model.generate(**inputs(), **CUSTOM, policy="full", past_key_values=PolicyCache(model, "full"), **SETTINGS)
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        model.generate(**inputs(), **CUSTOM, policy="snapkw", **SETTINGS)
    with pytest.raises(ValueError, match="windows"):  # nobody's: generate says so
        model.generate(**inputs(), **CUSTOM, policy="snapkv", budget=40, windows=8, **SETTINGS)


def test_the_pipeline_gets_a_cache_for_every_call() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False, **CUSTOM, "policy": "streaming_llm", "budget": 24}
    texts = [answer(PROMPT, **settings)[0]["generated_text"] for _ in range(2)]
    expected = model.generate(
        **inputs(), past_key_values=PolicyCache(model, "streaming_llm", budget=24), max_new_tokens=6, do_sample=False
    )
    assert texts == [tokenizer.decode(expected[0], skip_special_tokens=True)] * 2


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("text_generation_pipeline", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "load_model", lambda name: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setattr(sys, "argv", ["example", "--max-new-tokens", "4"])
    example.main()
    printed = capsys.readouterr().out
    assert "lighthouse: '" in printed and "observatory: '" in printed
