"""Selections by prepared calls, in one call a token, against the same operations one after another."""

import copy

import pytest
import torch

from kvpress import PolicyCache
from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.native import missing
from kvpress.kernels.pages.prepared import PreparedPages
from kvpress.policies import KNorm, Quest, TokenSelect
from kvpress.rope import Rotation
from kvpress.row_format import KV_DTYPES
from kvpress.testing.families import tiny_model

pytestmark = pytest.mark.skipif(missing is not None, reason="no native kernels")

PARTS = {"top_k": 5, "sinks": 2, "local": 6, "chunk": 6, "tail": 2}


@pytest.fixture(scope="module")
def narrow():
    """The kernels serve fp32."""
    return tiny_model("llama", dtype=torch.float32)


def decoded(model, cache, ids, patch=None):
    """Logits of every decoded token, and what each layer attended to."""
    with pytest.MonkeyPatch.context() as context, torch.no_grad():
        if patch is not None:
            patch(context)
        logits, read = [], []
        for step in range(ids.shape[1]):
            logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
            read.append([cache.selected_positions(layer).tolist() for layer in (0, 1)])
    return torch.cat(logits, dim=1), read


def operation_by_operation(context):
    for prepared in (PreparedVote, PreparedPages):
        context.setattr(prepared, "refusal", staticmethod(lambda *tensors: "a test"))
    context.setattr(Rotation, "undo_in_place", lambda *given: False)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", [{}, {"group": "mod"}, {"index": "int8"}, {"index": "int4"}], ids=str)
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "int8"])
def test_tokenselect_chooses_as_operation_by_operation(feed, narrow, kv_dtype, positions, options, batch):
    policy = TokenSelect(**PARTS, positions=positions, threshold=0.7, **options)
    ids = torch.arange(3, 3 + 35 * batch).view(batch, 35).repeat_interleave(2, dim=1)  # equal tokens ask alike
    cache = PolicyCache(narrow, policy, kv_dtype=kv_dtype)
    feed(narrow, cache, ids, (40, 1, 1))
    other = copy.deepcopy(cache)
    logits, read = decoded(narrow, cache, ids[:, 42:])
    apart, read_apart = decoded(narrow, other, ids[:, 42:], operation_by_operation)
    assert read == read_apart
    assert torch.equal(logits, apart)
    report, by_parts = cache.report(), other.report()
    assert (report.selections, report.selections_reused) == (by_parts.selections, by_parts.selections_reused)
    assert report.selections > 4 and report.selections_reused > 4
    assert len(read[-1][0][0]) == 13, "nothing was selected"
    assert all(layer.selector._step is not None for layer in cache.policy_layers)
    assert all(layer.selector._step is None for layer in other.policy_layers)
    for layer, apart_layer in zip(cache.policy_layers, other.policy_layers, strict=True):
        assert torch.equal(layer.table.stored()[0], apart_layer.table.stored()[0])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES])
def test_quest_chooses_as_operation_by_operation(feed, narrow, kv_dtype, batch):
    ids = torch.stack([torch.arange(3, 73), torch.arange(3, 73).flip(0)])[:batch]
    cache = PolicyCache(narrow, Quest(top_k=16, page_size=4, skip_layers=1), kv_dtype=kv_dtype)
    feed(narrow, cache, ids, (40, 1, 1))
    other = copy.deepcopy(cache)
    logits, read = decoded(narrow, cache, ids[:, 42:])
    apart, read_apart = decoded(narrow, other, ids[:, 42:], operation_by_operation)
    assert read == read_apart
    assert torch.equal(logits, apart)
    ours, theirs = (each.policy_layers[1].selector for each in (cache, other))
    for bound, apart_bound in zip(ours.bounds(), theirs.bounds(), strict=True):
        assert torch.equal(bound, apart_bound)
    assert len(read[-1][1][0][0]) == 16 < 70, "nothing was selected"
    assert theirs._step is None and ours._step is not None


def test_a_choice_outlives_the_order_of_slots(feed, narrow):
    """Evicting begins while a selection that was made in order is used again: its slots are tokens then too."""
    cache = PolicyCache(narrow, [KNorm(budget=45), TokenSelect(**PARTS, positions="keep", threshold=-1)])
    ids = torch.arange(3, 73)[None]
    feed(narrow, cache, ids, (40, 1))
    other = copy.deepcopy(cache)
    _, read = decoded(narrow, cache, ids[:, 41:])
    _, apart = decoded(narrow, other, ids[:, 41:], operation_by_operation)
    assert read == apart
    assert cache.report().evictions > 0
    assert cache.report().selections_reused == other.report().selections_reused > 20
