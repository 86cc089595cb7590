"""Calibration of TidalDecode: the layer that, if it selects again, changes least what the model says."""

import copy

import pytest
import torch
from test_tidaldecode_sets import tidal

from kvpress import PolicyCache
from kvpress.cache_argument import passed
from kvpress.calibration import divergence, reselect_layer
from kvpress.policies import TidalDecode
from kvpress.testing.families import random_tokens, tiny_model
from kvpress.testing.selected_sets import oracle_pass

TOP_K, ROWS = 12, 6


@pytest.fixture
def deep():
    return tiny_model("llama", num_hidden_layers=6, dtype=torch.float64)


def oracle(model, ids, dense, **changes):
    """KL of every layer, from whole passes in fp64 without a cache: the last rows decoded under the formula of TidalDecode."""
    fed = ids.shape[1] - 1
    forwards = [[(0, fed - ROWS)], *[[(row, row + 1)] for row in range(fed - ROWS, fed)]]
    found = []
    for again in range(dense + 1, model.config.num_hidden_layers):
        choose = tidal(**{"dense": dense, "again": again, "top_k": TOP_K, **changes})
        rows = []
        for text in ids[:, :-1].tolist():
            full = oracle_pass(model, text, [[(0, fed)]], lambda question: None, reindex=False).logits[-ROWS:]
            selected = oracle_pass(model, text, forwards, choose(), reindex=False)
            assert selected.narrowed, "nothing was selected"
            p, q = full.softmax(-1), selected.logits[-ROWS:].softmax(-1)
            rows.append((p * (p / q).log()).sum(dim=-1))
        found.append(float(torch.cat(rows).mean()))
    return found


@pytest.mark.parametrize(("dense", "batch"), [(0, 1), (1, 2), (3, 1)])
def test_equals_predictions_made_without_a_cache(deep, dense, batch):
    ids = random_tokens(batch, 40, seed=4)
    found = divergence(deep, ids, TOP_K, dense, ROWS)
    expected = oracle(deep, ids, dense)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    apart = sorted(expected)
    assert apart[1] > 1.01 * apart[0] > 0, "all layers are alike: nothing was told apart"
    assert reselect_layer(deep, ids, TOP_K, dense, ROWS) == dense + 1 + expected.index(apart[0])


@pytest.mark.parametrize("sabotage", [{"top_k": TOP_K - 1}, {"reduce": min}, {"again": 3}, {"apart": True}])
def test_a_sabotaged_oracle_is_told_apart(deep, sabotage):
    ids = random_tokens(1, 40, seed=4)
    assert divergence(deep, ids, TOP_K, 1, ROWS).tolist() != pytest.approx(oracle(deep, ids, 1, **sabotage), rel=0.05)


@pytest.mark.parametrize("only", [2, 4])
def test_the_only_layer_that_has_a_say_is_found(deep, only):
    """A layer that selects again attends to everything, and no other layer's attention changes the hidden states."""
    for index, layer in enumerate(deep.model.layers):
        if index != only:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    ids = random_tokens(2, 40, seed=4)
    found = divergence(deep, ids, TOP_K, 1, ROWS)
    assert float(found[only - 2]) < 1e-6
    assert sum(float(each) > 1e-4 for each in found) == len(found) - 1
    assert reselect_layer(deep, ids, TOP_K, 1, ROWS) == only


def test_windows_are_what_they_were_before_each_layer():
    """Layers with a sliding window forget what a decoded token pushes out: every layer must begin with the same ones."""
    kinds = ["sliding_attention", "full_attention"] * 5
    model = tiny_model("gemma3", num_hidden_layers=10, layer_types=kinds, dtype=torch.float64)
    ids = random_tokens(1, 40, seed=4)
    found = divergence(model, ids, TOP_K, 0, ROWS)
    log_probabilities = []
    for policy in (None, *(TidalDecode(top_k=TOP_K, dense_layers=0, reselect_layer=again) for again in range(1, 5))):
        cache = PolicyCache(model, policy or TidalDecode(top_k=64))
        cuts = [ids.shape[1] - ROWS - 1, *[1] * ROWS]
        with torch.no_grad():
            logits = [model(part, **passed(model, cache)).logits[:, -1] for part in ids[:, :-1].split(cuts, dim=1)]
        log_probabilities.append(torch.stack(logits[1:]).log_softmax(dim=-1))
    full, *selected = log_probabilities
    expected = [float((full.exp() * (full - each)).sum(dim=-1).mean()) for each in selected]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert len({round(each, 6) for each in expected}) == 4


def test_the_model_goes_on_as_before(deep):
    ids = random_tokens(1, 40, seed=4)
    before = copy.deepcopy(deep)(ids).logits
    reselect_layer(deep, ids, TOP_K)
    assert torch.allclose(deep(ids).logits, before)
    assert deep.generate(ids, max_new_tokens=2).shape == (1, 42)


def test_what_cannot_be_calibrated(deep):
    with pytest.raises(ValueError, match=r"more than top_k \+ rows = 40 tokens, got \(1, 40\)"):
        reselect_layer(deep, random_tokens(1, 40), 24, rows=16)
    with pytest.raises(ValueError, match="dense_layers must leave two of the model's 6 compressed layers, got 5"):
        reselect_layer(deep, random_tokens(1, 40), TOP_K, 5)
    with pytest.raises(ValueError, match="rows of calibration must be an integer >= 1, got 0"):
        reselect_layer(deep, random_tokens(1, 40), TOP_K, rows=0)
