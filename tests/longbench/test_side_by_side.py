"""Caches as the rows of a batch: each keeps and predicts what it does alone, up to rounding."""

import json

import pytest
import torch

from kvpress import PolicyCache
from kvpress.longbench.perplexity import run_perplexity, score_tokens, text_windows
from kvpress.longbench.ruler.haystack import Prose
from kvpress.longbench.runner import FULL, GroupEngine, Method, ModelEngine, ResultStore
from kvpress.longbench.runner.side_by_side import SideBySide, can_stand_side_by_side, decode_together
from kvpress.longbench.sample import Sample
from kvpress.testing.families import random_tokens, tiny_model

METHODS = [
    Method("streaming_llm", 24),
    Method("snapkv", 0.25, {"window": 4, "kernel_size": 3}),
    Method("adakv", 0.25, {"window": 4, "kernel_size": 3}),
    Method("h2o", 0.25),
    Method("random", 0.5),
    Method("quest", None, {"top_k": 8, "page_size": 4, "skip_layers": 0}),
    Method("tidaldecode", None, {"top_k": 8, "dense_layers": 0, "reselect_layer": 1}),
    Method("streaming_llm", 20, {"positions": "reindex"}),
]


def filled(model, ids):
    caches = [method.make_cache(model) for method in METHODS]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
    return caches


def test_rows_keep_and_predict_what_they_do_alone():
    model = tiny_model("llama", dtype=torch.float64)
    ids = random_tokens(1, 40, seed=5)
    turns = [random_tokens(len(METHODS), width, seed=width) for width in (6, 1, 1, 1, 1)]
    rows, alone = filled(model, ids), filled(model, ids)
    batch, lost = SideBySide(rows), 0
    with torch.no_grad():
        for turn in turns:
            together = model(turn, past_key_values=batch).logits
            for row, cache in enumerate(alone):
                expected = model(turn[row : row + 1], past_key_values=cache).logits[0]
                torch.testing.assert_close(together[row], expected, atol=1e-10, rtol=0)
        assert together.std(dim=0).max() > 1e-3
    for row, cache in enumerate(alone):
        assert cache.get_seq_length() == rows[row].get_seq_length() == 50
        for layer in range(2):
            assert torch.equal(cache.kept_positions(layer), rows[row].kept_positions(layer))
        lost += cache.kept_positions(0).shape[-1] < 50
    assert lost >= 5


def test_what_cannot_be_a_row():
    llama, latent = tiny_model("llama"), tiny_model("deepseek_v3")
    assert can_stand_side_by_side(PolicyCache(llama, "knorm", budget=10))
    sepllm = PolicyCache(llama, "sepllm", window=8, separators=2, capacity=20, token_ids=[5])
    for cache in (FULL.make_cache(llama), PolicyCache(latent, "knorm", budget=10), sepllm):
        assert not can_stand_side_by_side(cache)
        with pytest.raises(ValueError, match="caches must be PolicyCaches that can be rows of a batch"):
            SideBySide([cache])
    used = PolicyCache(llama, "knorm", budget=10)
    llama(torch.tensor([[3, 4]]), past_key_values=used)
    with pytest.raises(ValueError, match=r"caches must have seen equally many tokens, got \[0, 2\]"):
        SideBySide([used, PolicyCache(llama, "knorm", budget=10)])
    with pytest.raises(ValueError, match="batch must have one row for each of 1 caches, got 2"):
        llama(torch.tensor([[3], [4]]), past_key_values=SideBySide([used]))


def test_a_row_that_ends_leaves_the_others_alone():
    model = tiny_model("llama", dtype=torch.float64)
    ids, question = random_tokens(1, 40, seed=5), [5, 6, 7]
    expected = []
    for cache in filled(model, ids):
        feed, new = torch.tensor([question]), []
        with torch.no_grad():
            for _ in range(8):
                new.append(int(model(feed, past_key_values=cache).logits[0, -1].argmax()))
                feed = torch.tensor([new[-1:]])
        expected.append(new)
    ends = {new[3] for new in expected}
    found = {}
    decode_together(
        model,
        filled(model, ids),
        [question] * len(METHODS),
        limit=8,
        ends=ends,
        on_end=lambda row, new, *seconds: found.update({row: (list(new), seconds)}),
    )
    assert sorted(found) == list(range(len(METHODS)))
    for row, new in enumerate(expected):
        cut = next(place for place, token in enumerate(new) if token in ends)
        assert found[row][0] == new[: cut + 1]
        assert found[row][1][0] > 0
    assert len({len(new) for new, _ in found.values()}) > 1


SEPLLM = Method("sepllm", None, {"window": 8, "separators": 2, "capacity": 20, "token_ids": (5, 9)})


@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("newline", [True, False])
def test_answers_together_equal_those_one_by_one(query_aware, newline, model, tokenizer, encoder):
    text = "The same long context goes here. " * 6
    samples = [
        Sample("t", f"s{i}", text, f" Question {i}?", " Answer:", ("x",), "qa_f1", 7, stop_at_newline=newline)
        for i in range(2)
    ]
    batch = [(sample, encoder.encode(sample)) for sample in samples]
    double = model.to(torch.float64)
    try:
        alone = {
            (method.label, sample.sample_id): (answer.prediction, answer.new_tokens, answer.cache_bytes)
            for method in (*METHODS, SEPLLM)
            for (sample, _), answer in zip(
                batch, ModelEngine(double, tokenizer, query_aware=query_aware).answers(method, batch), strict=True
            )
        }
        engine = GroupEngine(double, tokenizer, query_aware=query_aware, together=True)
        found = {
            (method.label, sample.sample_id): (answer.prediction, answer.new_tokens, answer.cache_bytes)
            for method, sample, answer in engine.answers_of([*METHODS, SEPLLM], batch)  # one that cannot be a row
        }
    finally:
        model.to(torch.float32)
    assert found == alone
    assert len({prediction for prediction, *_ in alone.values()}) > 2


@pytest.fixture(scope="module")
def windows(tokenizer):
    return text_windows(Prose(seed=1).text(400), tokenizer, prefix=64, continuation=30, limit=2)


@pytest.mark.parametrize("step", [1, 7])
def test_perplexity_together_equals_one_by_one(step, model, windows):
    found = score_tokens(model, [FULL, *METHODS, SEPLLM], windows[0], chunk_size=step, together=True)
    losses = set()
    for method in (*METHODS, SEPLLM):
        (own,) = score_tokens(model, [method], windows[0], chunk_size=step).values()
        for name in ("nll", "kl", "agreement"):
            torch.testing.assert_close(getattr(found[method.label], name), getattr(own, name), atol=1e-4, rtol=1e-4)
        assert (found[method.label].cache_bytes, found[method.label].full_bytes) == (own.cache_bytes, own.full_bytes)
        losses.add(round(own.kl.sum().item(), 6))
    assert len(losses) > len(METHODS) - (step > 1) and max(losses) > 0.01  # quest selects for single tokens only


def test_perplexity_stopped_together_resumes_to_equal_totals(tmp_path, model, windows):
    options = {"methods_at_once": 2, "together": True, "progress": False}
    methods = [METHODS[1], METHODS[4], SEPLLM]
    for name in ("whole", "part"):
        with ResultStore(tmp_path / name, {"seed": 1}) as store:
            run_perplexity(model, windows, methods, store, **options)
    path, totals = tmp_path / "part" / "samples.jsonl", tmp_path / "part" / "totals.json"
    lines = path.read_text().splitlines()
    assert len(lines) == 8
    for kept in (1, 3, 6):
        path.write_text("".join(line + "\n" for line in lines[:kept]))
        totals.unlink()
        with ResultStore(tmp_path / "part", {"seed": 1}) as store:
            run_perplexity(model, windows, methods, store, **options)
        assert totals.read_bytes() == (tmp_path / "whole" / "totals.json").read_bytes()
    assert json.loads(totals.read_text())["methods"]["random@0.5"]["windows"] == 2
