"""Scores against one uncached forward in fp64, and against a cache that loses something."""

import json
import math

import pytest
import torch
from transformers import DynamicCache

from kvpress.longbench.perplexity import run_perplexity, score_tokens, text_windows
from kvpress.longbench.ruler.haystack import Prose
from kvpress.longbench.runner import FULL, Method, ResultStore


class ForgetfulCache(DynamicCache):
    """After its first forward, keys before the last 16 are zero: a lossy cache with an easy oracle."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        full = super().update(keys, values, layer_idx, *args, **kwargs)
        if keys.shape[-2] > 16:
            self.layers[layer_idx].keys = torch.cat([torch.zeros_like(keys[..., :-16, :]), keys[..., -16:, :]], dim=-2)
        return full


FORGETFUL = Method("forgetful", factory=lambda model: ForgetfulCache(config=model.config))


@pytest.fixture(scope="module")
def windows(tokenizer):
    return text_windows(Prose(seed=1).text(400), tokenizer, prefix=64, continuation=30, limit=2)


def test_windows_do_not_overlap_and_cover_in_order(tokenizer):
    text = Prose(seed=1).text(300)
    ids = tokenizer(text)["input_ids"]
    windows = text_windows(text, tokenizer, prefix=40, continuation=10)
    joined = [token for window in windows for token in (*window.prefix_ids, *window.next_ids)]
    assert len(windows) == len(ids) // 50 > 3 and joined == ids[: len(joined)]
    for bad, message in (({"prefix": 0}, "prefix must be"), ({"continuation": 10**6}, "the text has")):
        with pytest.raises(ValueError, match=message):
            text_windows(text, tokenizer, **{"prefix": 40, "continuation": 10, **bad})


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 100])
@pytest.mark.parametrize("prefill", [None, 13])
def test_full_cache_equals_one_uncached_forward(chunk_size, prefill, model, windows):
    window = windows[0]
    scores = score_tokens(model, [FULL], window, chunk_size=chunk_size, prefill_chunk_size=prefill)["full"]
    ids = torch.tensor([window.prefix_ids + window.next_ids])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits[63:-1], ids[0, 64:], reduction="none")
    assert scores.nll.shape == (30,) and expected.std() > 0.1
    torch.testing.assert_close(scores.nll, expected, atol=1e-4, rtol=0)
    assert scores.kl.abs().max() == 0 and scores.agreement.min() == 1


def test_divergence_of_a_lossy_cache_against_a_plain_formula(model, windows):
    window = windows[0]
    scores = score_tokens(model, [FORGETFUL], window, chunk_size=1)["forgetful"]
    caches = [DynamicCache(config=model.config), ForgetfulCache(config=model.config)]
    ids = torch.tensor([window.prefix_ids + window.next_ids])
    expected = []
    with torch.no_grad():
        outputs = [model(ids[:, :64], past_key_values=cache).logits[0, -1] for cache in caches]
        for position in range(64, 94):
            p, q = (output.double().softmax(-1) for output in outputs)
            expected.append((p * (p.log() - q.log())).sum().item())
            token = ids[:, position : position + 1]
            outputs = [model(token, past_key_values=cache).logits[0, -1] for cache in caches]
    assert max(expected) > 0.01 and expected[0] < 1e-9  # the prefix's own forward has lost nothing yet
    torch.testing.assert_close(scores.kl, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-4)
    assert 0 < scores.agreement.mean() < 1


def test_run_writes_resumes_and_compares(tmp_path, model, windows):
    settings = {"benchmark": "perplexity"}
    with ResultStore(tmp_path / "whole", settings) as store:
        totals = run_perplexity(model, windows, [FORGETFUL], store, progress=False)
    assert set(totals["methods"]) == {"full", "forgetful"}
    full, lossy = totals["methods"]["full"], totals["methods"]["forgetful"]
    assert full["ratio"] == 1 and full["kl"] == 0 and full["agreement"] == 100
    assert lossy["kl"] > 0 and lossy["ratio"] == pytest.approx(lossy["perplexity"] / full["perplexity"], rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert sum(bucket["tokens"] for bucket in rows[0]["buckets"]) == rows[0]["tokens"] == 30
    nll = math.fsum(row["nll"] for row in rows if row["method"] == "full") / 60
    assert full["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    with ResultStore(tmp_path / "part", settings) as store:
        run_perplexity(model, windows[:1], [FULL], store, progress=False)
    with ResultStore(tmp_path / "part", settings) as store:
        run_perplexity(model, windows, [FORGETFUL], store, progress=False)
    assert (tmp_path / "part" / "totals.json").read_bytes() == (tmp_path / "whole" / "totals.json").read_bytes()
