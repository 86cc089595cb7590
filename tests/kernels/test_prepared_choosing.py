"""Prepared choices of slots are those of checked calls, one operation after another."""

import pytest
import torch

from kvpress.kernels.choosing import best_slots, listed_slots, reused_slots
from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.native import missing
from kvpress.kernels.packing import pack_int4
from kvpress.kernels.pages import bounds_type, choose_pages, page_bounds
from kvpress.kernels.pages.prepared import PreparedPages
from kvpress.kernels.rotation import rotate
from kvpress.row_format import KV_DTYPES, row_format

pytestmark = pytest.mark.skipif(missing is not None, reason="no native kernels")

SINKS, TOP_K, LOCAL = 3, 20, 7
BATCH, KV_HEADS, ROOM, DIM = 2, 2, 90, 24


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def voted(query, keys, scale, slots, regroup, turn):
    """Rows `[batch]` apart: turn the query, vote, choose, list."""
    heads = query.shape[1]
    if turn is not None:
        cosine, sine = (table[None, None, None] for table in turn)
        query = rotate(query, cosine, sine, impl="native")
    if regroup:
        query = query.view(BATCH, -1, KV_HEADS, DIM).transpose(1, 2).reshape(BATCH, heads, 1, DIM)
    part = slice(SINKS, slots - LOCAL)
    votes = head_vote(
        query, keys[:, :, part], keys_scale=None if scale is None else scale[:, :, part], impl="native"
    ).nan_to_num(0.0)
    return (best_slots(votes, TOP_K, impl="native") + SINKS)[:, None]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("regroup", [False, True])
@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("kind", [None, "bfloat16", "int8", "int4"])
def test_a_prepared_vote_is_that_of_checked_calls(level, kind, group, regroup, turned):
    given = made(BATCH, KV_HEADS, ROOM, DIM, seed=1)
    form = row_format("int8" if kind == "int4" else kind)
    keys, scale = form.parts(pack_int4(given) if kind == "int4" else form.pack(given))
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    angles = made(8, seed=2).repeat(2)
    turn = (angles.cos(), angles.sin()) if turned else None
    base = made(BATCH, 1, KV_HEADS * group, DIM, seed=3)
    prepared = PreparedVote(
        base.to(dtype).transpose(1, 2), keys, scale, threshold=0.9, sinks=SINKS, top_k=TOP_K, local=LOCAL,
        regroup=regroup, turn=turn,
    )  # fmt: skip
    former = chosen = None
    again, lists = [], []
    for step, size in enumerate((0.0, 0.1, 0.2, 3.0, 3.05, 0.0)):
        noise = made(BATCH, 1, KV_HEADS * group, DIM, seed=4)
        if step == 4:
            noise[1] = -noise[1]  # one row of the batch uses its selection again, the other does not
        query = (base + size * noise).to(dtype).transpose(1, 2)
        slots = 60 + 5 * step
        index, reused = prepared.choose(query, slots)
        flat = query.flatten(1)
        rows = torch.zeros(BATCH, dtype=torch.bool)
        if former is not None:
            rows = torch.nn.functional.cosine_similarity(flat.double(), former.double()) >= 0.9
        anew = voted(query, keys, scale, slots, regroup, turn)
        chosen = anew if chosen is None else chosen.where(rows[:, None, None], anew)
        former = flat.clone() if former is None else former.where(rows[:, None], flat)
        assert torch.equal(index, listed_slots(chosen, sinks=SINKS, local=LOCAL, slots=slots, impl="reference"))
        assert reused == bool(rows.all())
        assert torch.equal(prepared.former, former) and torch.equal(prepared.chosen, chosen) and prepared.live.all()
        ends = {"threshold": 0.9, "sinks": SINKS, "local": LOCAL, "slots": slots}
        assert reused_slots(query, former, prepared.live, chosen, **ends) is not None
        again.append(reused)
        lists.append(index)
    assert again == [False, True, True, False, False, False]
    assert not torch.equal(lists[0][..., SINKS:-LOCAL], lists[3][..., SINKS:-LOCAL]), "the choice never changed"


def test_a_vote_that_is_no_number_counts_for_nothing(level):
    keys, query = made(1, 2, 40, DIM, seed=1), made(1, 4, 1, DIM)
    prepared = PreparedVote(query, keys, None, threshold=-1, sinks=1, top_k=5, local=2)
    nothing = torch.full_like(query, torch.nan)
    for _ in range(2):  # a cosine that is no number is close to nothing
        index, reused = prepared.choose(nothing, 40)
        assert not reused
        assert index.tolist() == [[[0, *range(33, 38), 38, 39]]], "of equal votes the later"


def test_a_selection_made_elsewhere_goes_on():
    keys, query = made(1, 2, 40, DIM, seed=1), made(1, 4, 1, DIM)
    prepared = PreparedVote(query, keys, None, threshold=0.9, sinks=1, top_k=2, local=2)
    prepared.remember(query.flatten(1), torch.ones(1, dtype=torch.bool), torch.tensor([[[7, 9]]]))
    index, reused = prepared.choose(query, 30)
    assert reused and index.tolist() == [[[0, 7, 9, 28, 29]]]


def test_other_calls_are_not_served():
    keys, query = made(1, 2, 40, DIM, seed=1), made(1, 4, 1, DIM)
    prepared = PreparedVote(query, keys, None, threshold=0.9, sinks=1, top_k=2, local=2)
    assert prepared.serves(made(1, 4, 1, DIM, seed=5), keys)
    for other in (
        query.double(),
        made(1, 2, 1, DIM),
        made(1, 4, DIM, 1).transpose(2, 3),
        query.clone().requires_grad_(),
    ):
        assert not prepared.serves(other, keys)
    assert not prepared.serves(query, keys.clone())
    with pytest.raises(ValueError, match="slots must be at least 5, those that are listed, got 4"):
        prepared.choose(query, 4)
    with pytest.raises(ValueError, match="cannot be prepared: native kernels take fp32"):
        PreparedVote(query.double(), keys.double(), None, threshold=0.9, sinks=1, top_k=2, local=2)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), *((torch.float32, name) for name in KV_DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 3])
def test_prepared_pages_are_those_of_checked_calls(level, group, dtype, kv_dtype):
    size, count, form = 8, 3, row_format(kv_dtype)
    stored = form.pack(made(BATCH, KV_HEADS, ROOM, DIM, seed=1).to(dtype))
    raw, scale = form.parts(stored)
    keys = form.unpack(stored, dtype)
    if kv_dtype is None:
        keys[1, 0, 45, 3] = torch.nan
    ours, theirs = (
        [torch.full((BATCH, KV_HEADS, 12, DIM), torch.nan, dtype=bounds_type(dtype)) for _ in range(2)]
        for _ in range(2)
    )
    for low_or_high, bound in zip(
        zip(ours, theirs, strict=True), page_bounds(keys[:, :, :40], page_size=size), strict=True
    ):
        for room in low_or_high:
            room[:, :, :5] = bound
    query = made(BATCH, 1, KV_HEADS * group, DIM).to(dtype).transpose(1, 2)
    prepared = PreparedPages(query, *ours, raw, scale, count=count, page_size=size)
    lists = set()
    for slots in range(41, 90):
        query = made(BATCH, 1, KV_HEADS * group, DIM, seed=slots).to(dtype).transpose(1, 2)
        index = prepared.choose(query, slots)
        low, high = (room[:, :, : -(-slots // size)] for room in theirs)
        key = keys[:, :, slots - 1 : slots]
        expected = choose_pages(query, low, high, count, page_size=size, slots=slots, key=key, impl="apart")
        assert torch.equal(index, expected)
        for own, other in zip(ours, theirs, strict=True):
            assert torch.equal(own.nan_to_num(nan=123.0), other.nan_to_num(nan=123.0))
        lists.add(str(index.tolist()))
        assert index.shape[-1] < slots
    assert len(lists) == 49


def test_other_choices_of_pages_are_not_served():
    keys, query, bound = made(1, 2, 40, DIM, seed=1), made(1, 4, 1, DIM), torch.zeros(1, 2, 4, DIM).bfloat16()
    prepared = PreparedPages(query, bound, bound.clone(), keys, count=2, page_size=8)
    assert prepared.serves(made(1, 4, 1, DIM, seed=5), bound, keys)
    assert not prepared.serves(query.double(), bound, keys)
    assert not prepared.serves(query, bound.clone(), keys)
    assert not prepared.serves(query, bound, keys.clone())
    for slots in (8, 33):
        with pytest.raises(ValueError, match=f"slots must make 2 to 4 pages of 8, got {slots}"):
            prepared.choose(query, slots)
    with pytest.raises(
        ValueError, match=r"prepared: bounds of torch\.float32 keys are torch\.bfloat16, got torch\.float32"
    ):
        PreparedPages(query, bound.float(), bound.float(), keys, count=2, page_size=8)
    with pytest.raises(ValueError, match=r"keys stored as torch\.float16 are rounded to the model's torch\.bfloat16"):
        PreparedPages(query.bfloat16(), bound, bound, keys.half(), count=2, page_size=8)
    with pytest.raises(ValueError, match="keys_scale must be given for int8 keys, got None"):
        PreparedPages(query, bound, bound, keys.to(torch.int8), count=2, page_size=8)
