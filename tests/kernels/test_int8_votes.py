"""Votes on int8 keys: by integers where the machine adds products of bytes, by floats elsewhere, and in both as exact as floats are."""

import math

import pytest
import torch

from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.native import missing
from kvpress.testing.slots_oracle import assert_within_budget, rejected

pytestmark = pytest.mark.skipif(missing is not None, reason="no native kernels")

SLOTS = 2 * 2048 + 3 * 64 + 5  # two pieces of 32 tiles, three tiles and a part of one
DIMS = [
    8,
    16,
    20,
    24,
    28,
    30,
    64,
    80,
    96,
    100,
    128,
    256,
]  # too few for integers, rows that end within a part of 16 bytes or a word
STEP = 127 * 2**16  # of which a query's largest channel is made
EPSILON = 2.0**-24  # half the distance of 1 from the next in fp32


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(dim, apart, kv_heads=2, slots=SLOTS):
    """Codes and scales of keys; `apart`: other bytes lie behind each row."""
    keys = drawn(1, kv_heads, slots, dim) / 4
    scales = keys.abs().amax(-1) / 127
    rows = torch.full((1, kv_heads, slots, dim + 4), 99, dtype=torch.int8)
    rows[..., :dim] = (keys / scales[..., None]).round()
    return (rows[..., :dim] if apart else rows[..., :dim].contiguous()), scales


def exact_scores(query, codes, scales):
    """`[query_heads, slots]` in fp64, of `query [1, query_heads, 1, dim]`."""
    keys = (codes.double() * scales.double()[..., None])[0].repeat_interleave(query.shape[1] // codes.shape[1], 0)
    return (keys @ query[0, :, 0].double()[..., None])[..., 0]


def exact_votes(query, codes, scales):
    return exact_scores(query, codes, scales).softmax(-1).sum(0)[None]


@pytest.mark.parametrize(("apart", "threads"), [(False, 2), (True, 1)])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", DIMS)
def test_votes_of_rows_side_by_side(level, poisoned, dim, group, apart, threads):
    codes, scales = stored(dim, apart)
    query = drawn(1, 2 * group, 1, dim, seed=1)
    torch.set_num_threads(threads)
    found = head_vote(query, codes, keys_scale=scales, impl="native")
    positions = torch.arange(SLOTS)[None, None]
    assert torch.equal(found, head_vote(query, codes, keys_scale=scales, positions=positions, impl="native"))
    exact = exact_votes(query, codes, scales)
    low = head_vote(query, codes, keys_scale=scales, impl="reference")
    assert_within_budget(found, low, exact)
    best = exact.argmax()
    codes[0, :, best] = codes[0, :, best - 1].clone()  # one row in another's place
    changed = head_vote(query, codes, keys_scale=scales, impl="native")
    assert rejected(assert_within_budget, changed, low, exact)


def off_by(found, scores, most):
    """Whether votes are further from the softmaxes of `scores` than scores that are each off by `most` can make them."""
    exact = scores.softmax(-1)
    room = (exact * math.expm1(2 * most)).sum(0) + 2e-5 * exact.sum(0)  # exponentials, sums and factors in fp32
    return bool(((found[0].double() - exact.sum(0)).abs() > room).any())


def check_derived(query, codes, scales, wrong):
    """What scores lose is derived from the largest channel, and from sums of fp32 in at least four lanes; `wrong` votes lose more."""
    found = head_vote(query, codes, keys_scale=scales, impl="native")
    scores, dim = exact_scores(query, codes, scales), query.shape[-1]
    sizes = (codes.abs().double() * scales.double()[..., None])[0, 0]
    lost = query.abs().max() / STEP / 2 * sizes.sum(-1).max()
    rounded = EPSILON * (dim / 4 + 8) * (sizes @ query[0, :, 0].abs().double().T).max()
    assert 0.5 < scores.abs().max() < 80
    assert not off_by(found, scores, float(lost + rounded))
    assert off_by(wrong, scores, float(lost + rounded))


@pytest.mark.parametrize("largest", [1e-30, 1.0, 3e4])
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_the_largest_sums_there_can_be(level, dim, largest):
    codes, scales = stored(dim, False, kv_heads=1, slots=300)
    codes[0, 0, 4], codes[0, 0, 5], codes[0, 0, 6] = 127, -127, -128
    scales = scales / largest / dim**0.5
    query = drawn(1, 3, 1, dim, seed=1).clamp(-1, 1) * largest
    query[0, 1:, 0] = torch.tensor([[1], [-1]]) * largest
    coarse = (query.double() / largest * 127).round() * largest / 127
    check_derived(query, codes, scales, exact_votes(coarse, codes, scales))


@pytest.mark.parametrize("dim", [64, 128, 512])
def test_small_channels_beside_a_large_one(level, dim):
    """Keys do not have the large one: all votes come from the lowest digits of the others."""
    codes, scales = stored(dim, False, kv_heads=1, slots=300)
    codes[..., 0] = 0
    query = drawn(1, 3, 1, dim, seed=1) * 2**-17
    query[..., 0] = 1
    check_derived(query, codes, scales * 2**17 / dim**0.5, torch.full((1, 300), 3 / 300))


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("unknown", [torch.nan, torch.inf])
def test_a_query_that_is_no_number_leaves_no_votes(level, impl, unknown):
    codes, scales = stored(64, False)
    query = drawn(1, 4, 1, 64, seed=1)
    query[0, 1, 0, 7] = unknown
    assert head_vote(query, codes, keys_scale=scales, impl=impl).isnan().all()


def test_a_query_of_zeros_votes_for_all_alike(level):
    codes, scales = stored(64, False)
    votes = head_vote(torch.zeros(1, 4, 1, 64), codes, keys_scale=scales, impl="native")
    torch.testing.assert_close(votes, torch.full_like(votes, 4 / SLOTS))


def test_ragged_heads_and_a_row_that_sees_nothing(level):
    codes, scales = (column[0, 0] for column in stored(64, False, kv_heads=1))
    starts, lengths = torch.tensor([[0, 200], [1000, 7]]), torch.tensor([[150, 700], [64, 130]])
    query, seen = drawn(2, 6, 1, 64, seed=1), torch.tensor([[-1], [5]])
    ragged = {"starts": starts, "lengths": lengths, "keys_scale": scales, "impl": "native"}
    positions = torch.arange(700).expand(2, 2, -1)
    found = head_vote(query, codes, **ragged)
    assert torch.equal(found, head_vote(query, codes, positions=positions, **ragged))
    assert abs(found[:, :700].sum() - 12) < 1e-3 and not found[1, 130:].any() and found[0, 150:].all()
    padded = head_vote(query, codes, query_positions=seen, **ragged)
    assert not padded[0].any() and torch.equal(padded[1], found[1])
