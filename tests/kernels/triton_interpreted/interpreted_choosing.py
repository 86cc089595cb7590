"""Choosing slots, interpreted: as the reference, number for number."""

from __future__ import annotations

import functools

import pytest
import torch

from kvpress.kernels import triton_best
from kvpress.kernels.choosing import best_slots, listed_slots, reused_slots
from kvpress.kernels.choosing.triton import pieces_of
from kvpress.kernels.choosing.triton_prepared import VoteLaunches
from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.pages import bounds_type, choose_pages, page_bounds
from kvpress.kernels.pages.reference import widen_last_page
from kvpress.kernels.pages.triton_prepared import PageLaunches
from kvpress.kernels.rotation import rotate
from kvpress.row_format import KV_DTYPES, row_format


@pytest.mark.parametrize("shape", [(1, 1, 50), (2, 3, 65), (4, 1030)], ids=str)
def test_best_slots_and_ties(generator, shape):
    scores = torch.randint(-4, 4, shape, generator=generator).float()
    scores[..., 3] = -0.0
    for count in (1, 7, 49, 2000):
        found, wanted = (best_slots(scores, count, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(found, wanted) and found.shape[-1] == min(count, shape[-1])


CUT = {(4096, 1), (4096, 300), (4096, 1500), (2048, 1), (2048, 300)}  # where pieces hold at least twice what is wanted


@pytest.mark.parametrize("most", [triton_best.MOST, 4096, 2048])
@pytest.mark.parametrize("count", [1, 300, 1500, 8999])
def test_best_slots_of_several_tiles(generator, monkeypatch, count, most):
    monkeypatch.setattr(triton_best, "MOST", most)
    assert (pieces_of(9000, count) > 1) == ((most, count) in CUT)
    scores = torch.randn(2, 9000, generator=generator).exp() * 1e-5
    scores[0, ::7] = scores[0, 5]  # more equals than are taken, in every tile
    scores[1, 10:4000] = torch.randn(3990, generator=generator)
    scores[1, 7], scores[1, 8], scores[1, 9] = torch.inf, -torch.inf, -3e38
    found = best_slots(scores, count, impl="triton")
    order = scores.flip(-1).double().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(found, (8999 - order).sort(dim=-1).values)
    assert torch.equal(found, best_slots(scores, count, impl="reference"))


SINKS, TOP_K, LOCAL, DIM = 3, 20, 7, 24


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("group", "regroup"), [(1, False), (3, False), (3, True), (5, True)])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_prepared_vote_is_that_of_checked_calls(generator, monkeypatch, kind, group, regroup, turned, parts):
    monkeypatch.setattr("kvpress.kernels.choosing.triton_prepared.plan_splits", lambda *_: parts)
    if parts > 1:  # the candidates of the last steps are cut into two pieces
        monkeypatch.setattr(triton_best, "MOST", 64)
    form, heads = row_format(kind), 2 * group
    keys, scale = form.parts(form.pack(torch.randn(2, 2, 120, DIM, generator=generator)))
    angles = torch.randn(8, generator=generator).repeat(2)
    turn = (angles.cos(), angles.sin()) if turned else None
    base, noise = torch.randn(2, 2, 1, heads, DIM, generator=generator)
    former, live = torch.zeros(2, heads * DIM), torch.zeros(2, dtype=torch.bool)
    chosen = torch.zeros(2, 1, TOP_K, dtype=torch.int64)
    launches = VoteLaunches(
        base.transpose(1, 2), keys, scale, former, live, chosen,
        threshold=0.9, sinks=SINKS, local=LOCAL, regroup=regroup, turn=turn,
    )  # fmt: skip
    wanted, before, again, cut = chosen.clone(), former.clone(), [], []
    for step, size in enumerate((0.0, 0.1, 0.2, 3.0, 3.05, 0.0)):
        if step == 4:
            noise[1] = -noise[1]  # one row of the batch uses its selection again, the other does not
        query, slots = (base + size * noise).transpose(1, 2), 60 + 10 * step
        index, reused = launches(query, slots)
        voting = query
        if turn is not None:
            voting = rotate(query, *(table[None, None, None] for table in turn), impl="reference")
        if regroup:
            voting = voting.view(2, -1, 2, DIM).transpose(1, 2).reshape(2, heads, 1, DIM)
        part = slice(SINKS, slots - LOCAL)
        cut.append(pieces_of(slots - SINKS - LOCAL, TOP_K))
        votes = head_vote(
            voting, keys[:, :, part], keys_scale=None if scale is None else scale[:, :, part], impl="reference"
        )
        anew = (best_slots(votes, TOP_K, impl="reference") + SINKS)[:, None]
        rows = torch.nn.functional.cosine_similarity(query.flatten(1).double(), before.double()) >= 0.9
        rows &= step > 0
        wanted = wanted.where(rows[:, None, None], anew)
        before = query.flatten(1).where(~rows[:, None], before)
        assert torch.equal(index, listed_slots(wanted, sinks=SINKS, local=LOCAL, slots=slots, impl="reference"))
        assert reused == bool(rows.all()) and live.all()
        assert torch.equal(chosen, wanted) and torch.equal(former, before)
        again.append(reused)
    assert again == [False, True, True, False, False, False]
    assert cut == ([1, 1, 1, 2, 2, 2] if parts > 1 else [1] * 6)
    assert sum(tensor.numel() for tensor in launches.tensors()) == 2 + 2 * heads * DIM + 1


def test_a_vote_that_is_no_number_counts_for_nothing(generator):
    keys, query = torch.randn(1, 2, 40, DIM, generator=generator), torch.full((1, 4, 1, DIM), torch.nan)
    state = (torch.zeros(1, 4 * DIM), torch.zeros(1, dtype=torch.bool), torch.zeros(1, 1, 5, dtype=torch.int64))
    launches = VoteLaunches(query, keys, None, *state, threshold=-1, sinks=1, local=2, regroup=False, turn=None)
    for _ in range(2):  # a cosine that is no number is close to nothing
        index, reused = launches(query, 40)
        assert not reused
        assert index.tolist() == [[[0, *range(33, 38), 38, 39]]], "of equal votes the later"


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, None), (torch.float16, None), *((torch.float32, name) for name in KV_DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 3])
def test_prepared_pages_are_those_of_checked_calls(generator, group, dtype, kv_dtype):
    size, count, room, form = 6, 3, 330, row_format(kv_dtype)
    raw, scale = form.parts(form.pack(torch.randn(2, 2, room, DIM, generator=generator).to(dtype)))
    keys = raw.to(dtype) if scale is None else raw.float() * scale[..., None]
    if kv_dtype is None:
        keys[1, 0, 45, 3] = torch.nan
        raw = keys
    ours, theirs = (
        [torch.full((2, 2, 60, DIM), torch.nan, dtype=bounds_type(dtype)) for _ in range(2)] for _ in range(2)
    )
    for rooms, bound in zip(zip(ours, theirs, strict=True), page_bounds(keys[:, :, :40], page_size=size), strict=True):
        for bounds in rooms:
            bounds[:, :, :7] = bound
    make = functools.partial(torch.randn, 2, 1, 2 * group, DIM, generator=generator)
    launches = PageLaunches(make().to(dtype).transpose(1, 2), *ours, raw, scale, count=count, page_size=size)
    lists = set()
    for slots in range(41, room):
        key = keys[:, :, slots - 1 : slots]
        query = make().to(dtype).transpose(1, 2)
        low, high = (bounds[:, :, : -(-slots // size)] for bounds in theirs)
        if 50 < slots < 324:  # only the bounds go on
            widen_last_page(low, high, key, (slots - 1) % size == 0)
            for own, other in zip(ours, theirs, strict=True):
                own.copy_(other)
            continue
        index = launches(query, slots)
        expected = choose_pages(query, low, high, count, page_size=size, slots=slots, key=key, impl="apart")
        assert torch.equal(index, expected), slots
        for own, other in zip(ours, theirs, strict=True):
            assert torch.equal(own.nan_to_num(nan=123.0), other.nan_to_num(nan=123.0)), slots
        lists.add(str(index.tolist()))
        assert index.shape[-1] < slots
    assert len(lists) == 16


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("sinks", "local"), [(0, 1), (4, 0), (3, 1200)])
def test_lists_of_slots(generator, heads, sinks, local):
    chosen = torch.randint(5, 900, (2, heads, 9), generator=generator)
    found, wanted = (
        listed_slots(chosen, sinks=sinks, local=local, slots=3000, impl=impl) for impl in ("triton", "reference")
    )
    assert torch.equal(found, wanted)
    strided = chosen.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(listed_slots(strided, sinks=sinks, local=local, slots=3000, impl="triton"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_selection_is_used_again_for_a_query_close_by(generator, dtype):
    former = torch.randn(2, 6 * 80, generator=generator).to(dtype)
    query = (
        (former.float() + 0.3 * torch.randn(2, 480, generator=generator)).to(dtype).view(2, 1, 6, 80).transpose(1, 2)
    )
    live, chosen = torch.tensor([True, True]), torch.randint(4, 90, (2, 1, 5), generator=generator)
    cosine = torch.nn.functional.cosine_similarity(query.flatten(1).double(), former.double())
    options = {"sinks": 2, "local": 3, "slots": 100}
    for threshold, again in ((float(cosine.min()) - 1e-12, True), (float(cosine.min()) + 1e-12, False), (-1.0, True)):
        for impl in ("triton", "reference"):
            found = reused_slots(query, former, live, chosen, threshold=threshold, impl=impl, **options)
            assert (found is not None) == again, (threshold, impl)
            assert found is None or torch.equal(found, listed_slots(chosen, impl="reference", **options))
    same = former.view(2, 6, 1, 80)
    assert reused_slots(same, former, live, chosen, threshold=1 - 1e-12, impl="triton", **options) is not None
    assert reused_slots(same, former, ~live, chosen, threshold=-1.0, impl="triton", **options) is None
    assert reused_slots(same * 0, former, live, chosen, threshold=0.1, impl="triton", **options) is None
