"""Decoding against the stock cache: what is compared, and that nothing is timed that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from kvpress import PolicyCache
from kvpress.cache_argument import found
from kvpress.cli import app
from kvpress.offload import Offload
from kvpress.policies import Full, KNorm
from kvpress.profiling import bench as benching
from kvpress.profiling import turns
from kvpress.profiling.candidates import make_candidates
from kvpress.profiling.turns import attention_of, decode_seconds, logits_difference, random_cache, ratios
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.tiny_checkpoint import tiny_model as checkpoint_model
from kvpress.testing.tiny_checkpoint import tiny_tokenizer

runner = CliRunner()


def test_caches_take_turns_under_their_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    stock = random_cache(model, 50, batch=2)
    caches = {"stock": stock, "full": PolicyCache.from_cache(model, Full(), stock)}
    seen: list[tuple[str, str, int]] = []
    forward = type(model).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = found(kwargs)
        name = next(name for name, known in caches.items() if known is cache)
        seen.append((name, self.config._attn_implementation, cache.get_seq_length()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    seconds = decode_seconds(model, caches, torch.tensor([[7], [8]]), steps=4)
    assert {name: len(values) for name, values in seconds.items()} == {"stock": 4, "full": 4}
    assert [name for name, _, _ in seen] == ["stock", "full"] * 7  # three turns warm up
    assert {name: implementation for name, implementation, _ in seen} == {"stock": "sdpa", "full": "kvpress"}
    assert [length for _, _, length in seen] == [length for length in range(50, 57) for _ in range(2)]


def test_the_attention_that_a_model_had_comes_back() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    with attention_of(model) as use_stock:
        use_stock(False)
        assert model.config._attn_implementation == "kvpress"
        use_stock(True)
        assert model.config._attn_implementation == "eager"
        use_stock(False)
    assert model.config._attn_implementation == "eager"
    PolicyCache(model, "full")
    with pytest.raises(RuntimeError), attention_of(model) as use_stock:
        use_stock(True)
        assert model.config._attn_implementation == "eager"  # remembered, not the default
        raise RuntimeError
    assert model.config._attn_implementation == "kvpress"


def test_ratios_are_of_medians() -> None:
    found = ratios({"stock": [0.004, 0.002, 0.1], "other": [0.001, 0.002, 0.002]})
    assert found["stock"] == {"token_milliseconds": 4.0, "speedup": 1.0}
    assert found["other"] == {"token_milliseconds": 2.0, "speedup": 2.0}


def test_a_random_cache_is_a_cache_that_was_read() -> None:
    model = tiny_model("gpt_neox")
    cache = random_cache(model, 30, batch=2)
    read = DynamicCache(config=model.config)
    model(random_tokens(2, 30), past_key_values=read, use_cache=True)
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in read.layers]
    assert [layer.values.dtype for layer in cache.layers] == [layer.values.dtype for layer in read.layers]
    with pytest.raises(ValueError, match="fill its cache with a prompt"):
        random_cache(tiny_model("gemma3"), 30)


def test_logits_agree_for_the_full_policy_and_not_for_another() -> None:
    model, ids = tiny_model(), random_tokens(1, 60)
    difference, agree = logits_difference(model, Full(), ids)
    assert agree and difference < 1e-4
    difference, agree = logits_difference(model, KNorm(budget=8), ids)
    assert not agree and difference > 1e-3


def test_logits_behind_another_token_are_of_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_tokens(2, 3)
    first = torch.zeros(3, 2, 4)
    first[:, :, 0] = 8.0
    second = first.clone()
    second[1, 0] += 0.004  # row 0 takes another token here, all but a tie
    second[2, 0] += 5.0
    second[2, 1] += 0.002
    tokens = [torch.zeros(2, 3, dtype=torch.long) for _ in range(2)]
    tokens[1][0, 1:] = 1

    def both() -> list[SimpleNamespace]:
        return [
            SimpleNamespace(logits=tuple(logits), sequences=torch.cat([ids, chosen], dim=1))
            for logits, chosen in zip((first, second), tokens, strict=True)
        ]

    for change, expected in ((0.0, 0.004 / 8), (1.0, 1.0 / 8)):
        second[2, 1, 3] = change or 0.002  # of a row that took the same tokens
        outputs = iter(both())
        monkeypatch.setattr(type(model), "generate", lambda *_, outputs=outputs, **__: next(outputs))
        difference, agree = logits_difference(model, Full(), ids, new_tokens=3)
        assert difference == pytest.approx(expected, rel=1e-4)
        assert agree == (not change)


def test_rows_of_each_fill() -> None:
    model, tokenizer = checkpoint_model(), tiny_tokenizer()
    policies = ["full", "snapkv:window=8", "sepllm:token_ids=[5]", "stock", "full:kv_dtype=int8"]
    candidates = make_candidates(policies, ["32"], stock=True)
    labels: list[str] = []
    rows = benching.bench(model, tokenizer, candidates, 100, batch=2, steps=2, advance=labels.append)
    expected = ["stock", "full", "snapkv@32[window=8]", "sepllm[token_ids=[5]]", "full[kv_dtype=int8]"]
    assert [row["label"] for row in rows] == labels == expected
    assert "use --fill prompt" in rows[3]["error"]
    assert rows[0]["speedup"] == 1.0
    held = {row["label"]: row["kv_held_bytes"] for row in rows if "error" not in row}
    assert held["full[kv_dtype=int8]"] < 0.5 * held["full"]
    config = model.config
    token = 2 * config.num_key_value_heads * config.head_dim * 4  # keys and values, fp32
    assert held["stock"] == config.num_hidden_layers * 2 * token * 105  # two rows
    assert held["snapkv@32[window=8]"] < held["stock"] / 2 < held["full"]
    read = benching.bench(model, tokenizer, candidates, 100, steps=2, fill="prompt")
    assert ["error" in row for row in read] == [False] * 5
    assert all(row["token_milliseconds"] > 0 for row in read)
    with pytest.raises(ValueError, match="fill must be one of"):
        benching.bench(model, tokenizer, candidates, 100, fill="prose")


def offloaded(path: Path) -> Offload:
    return Offload(host="60kB", disk=path, block=8)


@pytest.mark.parametrize("fill", ["random", "prompt"])
def test_bytes_of_each_tier_are_told_and_freed(fill: str, tmp_path: Path) -> None:
    model, tokenizer = checkpoint_model(), tiny_tokenizer()
    candidates = make_candidates(["full", "tova", "snapkv:window=8"], ["32"], stock=True)
    plain = benching.bench(model, tokenizer, candidates, 200, steps=2, fill=fill)
    rows = benching.bench(model, tokenizer, candidates, 200, steps=2, fill=fill, offload=offloaded(tmp_path))
    assert [row["label"] for row in rows] == [row["label"] for row in plain] and len(rows) == 4
    assert all(row["tiers"] == {} for row in (*plain, rows[0]))
    full, tova = rows[1], rows[2]
    assert full["tiers"]["disk"] > 0 < full["tiers"]["host"] <= 60_000
    assert full["kv_held_bytes"] < plain[1]["kv_held_bytes"] - full["tiers"]["disk"] / 2
    assert 0 < tova["tiers"]["host"] <= 60_000
    assert list(tmp_path.iterdir()) == []


def test_a_tier_without_room_is_the_failure_of_one_cache() -> None:
    model, tokenizer = checkpoint_model(), tiny_tokenizer()
    candidates = make_candidates(["full", "knorm"], ["32"], stock=False)  # knorm evicts as it takes over
    rows = benching.bench(model, tokenizer, candidates, 200, steps=1, offload=Offload(host="30kB"))
    assert "has no room" in rows[1]["error"] and "use --fill prompt" not in rows[1]["error"]
    assert "error" not in rows[2] and 0 < rows[2]["tiers"]["host"] <= 30_000


def test_the_command(checkpoint: str) -> None:
    arguments = ["bench", "-m", checkpoint, "-p", "snapkv:window=8,sepllm", "-b", "32", "-c", "64,100", "--steps", "1"]
    result = runner.invoke(app, [*arguments, "--device", "cpu", "--threads", "1", "--json"])
    assert result.exit_code == 1
    assert "use --fill prompt" in result.stderr
    found = json.loads(result.stdout)
    assert found["check"]["agree"] is True
    assert [(row["label"], row["context"]) for row in found["rows"]][:4] == [
        ("stock", 64),
        ("snapkv@32[window=8]", 64),
        ("sepllm", 64),
        ("stock", 100),
    ]
    shown = runner.invoke(app, [*arguments, "--device", "cpu", "--fill", "prompt"])
    assert shown.exit_code == 0, shown.output
    assert "against stock" in shown.stdout and "1.00x" in shown.stdout


def test_wrong_logits_are_not_timed(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "Full", lambda: KNorm(budget=8))
    monkeypatch.setattr(turns, "TOLERANCE", {torch.float32: 1e-9})
    monkeypatch.setattr(benching, "bench", lambda *args, **kwargs: pytest.fail("timed"))
    result = runner.invoke(app, ["bench", "-m", checkpoint, "-c", "64", "--steps", "1", "--device", "cpu", "--json"])
    assert result.exit_code == 1
    assert "nothing is timed" in result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert (found["check"]["agree"], found["rows"]) == (False, [])
