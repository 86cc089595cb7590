"""The Selection Cache of decoding: what a hit returns, what is counted, and what makes it void."""

import copy

import pytest
import torch

from kvpress import PolicyCache
from kvpress.policies import KNorm, SnapKV, TokenSelect
from kvpress.policies.selection import SlotView, best_slots

POLICY = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, tail=0, positions="keep", threshold=1.0)


def view(seed=0, *, batch=1, slots=40, query=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 2, 200, 8, generator=generator)[:, :, :slots].expand(batch, -1, -1, -1)
    if query is None:
        query = torch.randn(1, 4, 1, 8, generator=generator).expand(batch, -1, -1, -1)
    positions = torch.arange(slots, dtype=torch.int32).expand(batch, 2, slots)
    return SlotView(
        query * scale,
        keys,
        positions,
        slots - 1,
        1.0,
        ordered=True,
        ascending=True,
        decoding=True,
        new=slice(slots - 1, slots),
        shared=True,
    )


def test_a_hit_returns_what_a_miss_at_the_same_query_returns():
    selector = POLICY.selector(0, 0, 1, {})
    missed = selector.select(view())
    hit = selector.select(view(scale=2.0))  # the cosine with twice the query is 1
    anew = POLICY.selector(0, 0, 1, {}).select(view(scale=2.0))
    assert (selector.misses, selector.hits) == (1, 1)
    assert torch.equal(missed, hit)
    assert torch.equal(hit.double(), missed.double())
    assert anew.shape == hit.shape


def test_a_hit_moves_the_window_and_keeps_the_choice():
    selector = POLICY.selector(0, 0, 1, {})
    first = selector.select(view(slots=40))[0, 0].tolist()
    later = selector.select(view(slots=44, query=view().query))[0, 0].tolist()
    assert selector.hits == 1
    assert later == [*first[:7], *range(38, 44)]
    assert first[7:] == list(range(34, 40))


def test_the_query_of_the_last_miss_is_compared_not_the_last_query():
    """Steps that each turn by 20 degrees: the second is 40 degrees from the one that chose."""
    a, b = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    a[..., 0], b[..., 1] = 1, 1
    turned = [a * torch.cos(torch.tensor(angle)) + b * torch.sin(torch.tensor(angle)) for angle in (0.0, 0.35, 0.7)]
    policy = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, threshold=0.9)
    selector = policy.selector(0, 0, 1, {})
    for query in turned:
        selector.select(view(query=query))
    assert (selector.misses, selector.hits) == (2, 1)


def test_rows_of_a_batch_hit_and_miss_apart():
    selector = POLICY.selector(0, 0, 1, {})
    first = view(batch=2)
    chosen = selector.select(first)
    other = first.query.clone()
    other[1] = -other[1]
    second = selector.select(view(batch=2, query=other))
    assert (selector.misses, selector.hits) == (2, 0)
    assert torch.equal(second[0], chosen[0])
    assert not torch.equal(second[1], chosen[1])
    assert torch.equal(selector.query[0], first.query[0].flatten())
    assert torch.equal(selector.query[1], other[1].flatten())


def test_above_1_every_step_selects_anew(feed, llama):
    for threshold, reused in ((2, 0), (-1, 2 * 9)):
        policy = TokenSelect(top_k=5, sinks=2, local=6, chunk=6, threshold=threshold, positions="keep")
        fed = feed(llama, PolicyCache(llama, policy), torch.arange(3, 43)[None], (30, *[1] * 10))
        report = fed.cache.report()
        assert report.selections_reused == reused
        assert report.selections + report.selections_reused == 2 * 10


def always(positions="keep", **changes):
    return TokenSelect(
        **{"top_k": 5, "sinks": 2, "local": 6, "chunk": 6, "threshold": -1.0, "positions": positions, **changes}
    )


def decode(model, cache, ids):
    with torch.no_grad():
        return torch.cat(
            [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(ids.shape[1])], dim=1
        )


@pytest.mark.parametrize(
    "eviction", [None, SnapKV(budget=24, window=4, kernel_size=3), KNorm(budget=22, interval=4)], ids=str
)
def test_beams_swap_what_was_chosen(feed, llama, eviction):
    policies = [always()] if eviction is None else [eviction, always()]
    ids, more = torch.arange(3, 83).view(2, 40), torch.arange(40, 50).view(2, 5)
    cache = PolicyCache(llama, policies)
    feed(llama, cache, ids, (30, 1, 1, 1))
    copied = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    a, b = decode(llama, cache, more.flip(0)), decode(llama, copied, more)
    assert float((a.flip(0) - b).abs().max()) < 1e-12
    assert cache.report().selections_reused > 10
    for layer in (0, 1):
        assert torch.equal(cache.selected_positions(layer).flip(0), copied.selected_positions(layer))


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_an_evicted_token_is_not_attended_to_again(feed, llama, positions):
    """Every step reuses; what H2O-like policies evict meanwhile drops out of the choice, and no other token takes its place."""
    cache = PolicyCache(llama, [KNorm(budget=22), always(positions)])
    feed(llama, cache, torch.arange(3, 43)[None], (30, 1))
    chosen = [
        {p for p in head.tolist() if p <= 24} for head in cache.selected_positions(0)[0]
    ]  # the rest is the window
    lost = 0
    for newest in range(31, 43):
        held = [set(head.tolist()) | {newest} for head in cache.kept_positions(0)[0]]
        decode(llama, cache, torch.tensor([[19 + newest]]))
        window = set(range(newest - 5, newest + 1))
        for head, positions_now in enumerate(cache.selected_positions(0)[0].tolist()):
            assert {p for p in positions_now if p >= 0} == (chosen[head] | window | {0, 1}) & held[head]
            lost += len(chosen[head] - held[head]) > 0
    assert cache.report().selections_reused == 2 * 12
    assert lost


def test_cropping_and_prompts_make_it_void(feed, llama):
    cache = PolicyCache(llama, always())
    feed(llama, cache, torch.arange(3, 43)[None], (30, 1, 1))
    assert cache.report().selections == 2
    cache.crop(-1)
    decode(llama, cache, torch.tensor([[50]]))
    assert cache.report().selections == 4
    with torch.no_grad():
        llama(torch.tensor([[60, 61, 62]]), past_key_values=cache)
    decode(llama, cache, torch.tensor([[51]]))
    assert cache.report().selections == 6


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("eviction", [None, SnapKV(budget=24, window=4, kernel_size=3)], ids=str)
def test_a_saved_cache_goes_on_as_the_one_in_memory(feed, llama, tmp_path, positions, eviction):
    policies = [always(positions)] if eviction is None else [eviction, always(positions)]
    cache = PolicyCache(llama, policies)
    feed(llama, cache, torch.arange(3, 83).view(2, 40), (30, 1, 1))
    cache.save(tmp_path / "saved")
    loaded = PolicyCache.load(tmp_path / "saved", llama)
    more = torch.arange(40, 50).view(2, 5)
    assert torch.equal(decode(llama, loaded, more), decode(llama, cache, more))
    assert loaded.report().selections == cache.report().selections == 2, "the loaded cache had to choose anew"
    assert loaded.report().selections_reused == cache.report().selections_reused > 10
    assert loaded.nbytes <= cache.nbytes


def test_best_slots_prefers_the_later_of_equal_ones():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert best_slots(scores, 3).tolist() == [[0, 3, 4], [3, 4, 5]]
    assert best_slots(scores, 9).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    positions = torch.tensor([[5, 4, 3, 9, 1, 0]]).expand(2, -1)
    assert best_slots(scores, 3, positions).tolist() == [[2, 0, 3], [1, 0, 3]]  # by position
