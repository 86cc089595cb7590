"""Quest (arXiv 2406.10774): bounds are bounds, pages are the formula's, and running bounds are those made anew."""

import copy

import pytest
import torch

from kvpress import PolicyCache
from kvpress.kernels.pages import page_bounds, page_scores
from kvpress.policies import AdaKV, KNorm, Quest, SnapKV, StreamingLLM
from kvpress.testing.families import tiny_model

SIZE, BUDGET = 4, 12


def pager(*, forced=True, by_mean=False, first_layer=0, budget=BUDGET):
    """Pages of `SIZE` tokens, counted from the row's first one; a growing cache."""

    def choose(question):
        held = question.held[0]
        if not question.decoding or len(held) <= budget or question.layer < first_layer:
            return None
        heads, kv_heads = question.query.shape[0], question.keys.shape[0]
        sets = []
        for owner in range(kv_heads):
            scores = {}
            for page in range((len(held) + SIZE - 1) // SIZE):
                keys = question.keys[owner, page * SIZE : (page + 1) * SIZE]
                low, high = keys.min(dim=0).values, keys.max(dim=0).values
                if by_mean:
                    low = high = keys.mean(dim=0)
                bounds = [
                    float(
                        sum(
                            max(q * a, q * b)
                            for q, a, b in zip(
                                question.query[head, 0].tolist(), low.tolist(), high.tolist(), strict=True
                            )
                        )
                    )
                    for head in range(heads)
                    if head * kv_heads // heads == owner
                ]
                scores[page] = max(bounds)
            newest = (len(held) - 1) // SIZE
            order = sorted(scores, key=lambda page: (forced and page == newest, scores[page], page), reverse=True)
            pages = order[: budget // SIZE]
            sets.append([p for p in held if p // SIZE in pages])
        return sets

    return lambda: choose


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_pages_and_logits_equal_the_formula(compare, heads):
    model = tiny_model("llama", dtype=torch.float64, num_key_value_heads=heads)
    policy = Quest(top_k=BUDGET, page_size=SIZE, skip_layers=0)
    fed, result = compare(model, policy, pager(), sizes=(29, *[1] * 9))
    assert result.error < 1e-9
    assert result.narrowed == 2 * 9
    for forward in range(1, 10):
        for head in fed.sets(forward, 0, 0):
            assert 29 + forward - 1 in head


def test_skipped_layers_attend_to_everything(compare, llama):
    _, result = compare(
        llama, Quest(top_k=BUDGET, page_size=SIZE, skip_layers=1), pager(first_layer=1), sizes=(29, *[1] * 9)
    )
    assert result.error < 1e-9
    assert result.narrowed == 9


def test_padded_rows_and_turns_equal_each_row_alone(compare, llama):
    policy = Quest(top_k=BUDGET, page_size=SIZE, skip_layers=0)
    _, result = compare(llama, policy, pager(), sizes=(29, *[1] * 9, 5, *[1] * 5), batch=3, pads=(0, 9, 3))
    assert result.error < 1e-9
    assert result.narrowed >= 2 * 12


@pytest.mark.parametrize("sabotage", [pager(forced=False), pager(by_mean=True), pager(budget=BUDGET - SIZE)])
def test_sabotaged_formulas_are_caught(compare, llama, sabotage):
    policy = Quest(top_k=BUDGET, page_size=SIZE, skip_layers=0)
    with pytest.raises(AssertionError):
        compare(llama, policy, sabotage, sizes=(29, *[1] * 9))


def test_bounds_are_upper_bounds():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 21, 8, generator=generator)
    positions = torch.arange(21).expand(2, 3, 21).clone()
    positions[0, :, :5] = -1
    query = torch.randn(2, 3, 2, 8, generator=generator)
    low, high = page_bounds(keys, page_size=4, positions=positions)
    bound = page_scores(query.view(2, 6, 1, 8), low, high).view(2, 3, 2, 6)
    assert bound.shape == (2, 3, 2, 6)
    products = torch.einsum("bhgd,bhsd->bhgs", query, keys).masked_fill(positions[:, :, None] < 0, -torch.inf)
    for slot in range(21):
        assert (products[..., slot] <= bound[..., slot // 4] + 1e-5).all()
    assert (bound[0, :, :, 0] == -torch.inf).all(), "a page without tokens must never be chosen"


@pytest.mark.parametrize(
    "eviction",
    [None, SnapKV(budget=20, window=4, kernel_size=3), StreamingLLM(budget=20), KNorm(budget=20, interval=5)],
    ids=["full", "snapkv", "streaming_llm", "knorm in bursts"],
)
def test_running_bounds_equal_bounds_made_anew(feed, llama, eviction):
    policy = Quest(top_k=BUDGET, page_size=SIZE, skip_layers=0)
    policies = policy if eviction is None else [eviction, policy]
    ids = torch.arange(3, 3 + 2 * 47).view(2, 47) % 94 + 3
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    running, anew = PolicyCache(llama, policies), PolicyCache(llama, policies)
    feed(llama, running, ids[:, :28], (28,), mask[:, :28])
    feed(llama, anew, ids[:, :28], (28,), mask[:, :28])
    narrow = 0
    for step in range(28, 47):
        for layer in anew.policy_layers:
            layer.selector.rearrange()
        outputs = []
        for cache in (running, anew):
            with torch.no_grad():
                positions = (mask.cumsum(-1) - 1)[:, step : step + 1]
                outputs.append(
                    llama(
                        ids[:, step : step + 1],
                        attention_mask=mask[:, : step + 1],
                        position_ids=positions,
                        past_key_values=cache,
                    ).logits
                )
        for a, b in zip(running.policy_layers, anew.policy_layers, strict=True):
            if a.selector.low is not None:  # a burst of evictions voids them
                for found, expected in zip(a.selector.bounds(), b.selector.bounds(), strict=True):
                    assert torch.equal(found, expected)
            assert torch.equal(running.selected_positions(a.layer_idx), anew.selected_positions(a.layer_idx))
            narrow += running.selected_positions(a.layer_idx).shape[-1] < running.kept_positions(a.layer_idx).shape[-1]
        assert torch.equal(*outputs)
    assert narrow > 20


def test_beams_and_copies_keep_their_bounds(feed, llama):
    ids = torch.arange(3, 3 + 2 * 40).view(2, 40)
    cache = PolicyCache(llama, Quest(top_k=BUDGET, page_size=SIZE, skip_layers=0))
    feed(llama, cache, ids, (30, 1, 1))
    copied = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = ids.flip(0)
    with torch.no_grad():
        a = llama(swapped[:, 32:33], past_key_values=cache).logits
        b = llama(ids[:, 32:33], past_key_values=copied).logits
    assert float((a.flip(0) - b).abs().max()) < 1e-12
    assert torch.equal(cache.selected_positions(1).flip(0), copied.selected_positions(1))


def test_pages_forget_tokens_that_left_slots_where_they_stood(feed, llama):
    """Heads of unequal size that evict at intervals: what is chosen is what bounds made anew would choose."""
    cache = PolicyCache(
        llama, [AdaKV(budget=24, window=4, kernel_size=3, interval=4), Quest(top_k=8, page_size=4, skip_layers=0)]
    )
    feed(llama, cache, torch.arange(3, 43)[None], (30, 1))
    evicted = 0
    for token in range(20, 50):
        anew = copy.deepcopy(cache)
        for layer in anew.policy_layers:
            layer.selector.rearrange()
        before = cache.report().evictions
        with torch.no_grad():
            for each in (cache, anew):
                llama(torch.tensor([[token]]), past_key_values=each)
        evicted += cache.report().evictions - before
        for layer in (0, 1):
            assert torch.equal(cache.selected_positions(layer), anew.selected_positions(layer))
    table = cache.policy_layers[0].table
    assert evicted >= 20 and table.rows is not None and table.spare is not None
    assert cache.selected_positions(0).shape[-1] < cache.kept_positions(0).shape[-1]
