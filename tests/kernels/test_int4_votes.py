"""Votes on int4 keys that lie side by side, and the best of many: rows found without a list, against what finds them otherwise."""

import pytest
import torch

from kvpress.kernels.choosing.prepared import PreparedVote
from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.native import extension, missing
from kvpress.kernels.packing import pack_int4
from kvpress.testing.slots_oracle import assert_within_budget, rejected

pytestmark = pytest.mark.skipif(missing is not None, reason="no native kernels")

SLOTS = 2 * 2048 + 3 * 64 + 5  # two pieces of 32 tiles, three tiles and a part of one
DIMS = [24, 40, 64, 104, 128]  # rows that end within each part of 16 bytes, and those of known sizes


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(dim, apart, kv_heads=2, slots=SLOTS):
    """Codes and scales of keys; `apart`: the scale of a row lies behind its codes, and so the rows apart."""
    packed = pack_int4(drawn(1, kv_heads, slots, dim) / 4, impl="reference")
    codes, scales = packed[..., : dim // 2], packed[..., dim // 2 :].view(torch.float32)[..., 0]
    return (codes, scales) if apart else (codes.contiguous(), scales.contiguous())


def exact_votes(query, codes, scales):
    """In fp64, from the definition: channels by a Walsh-Hadamard matrix, queries to 127 levels, softmax, sum over heads."""
    dim = query.shape[-1]
    block = dim & -dim
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turned = (query[0, :, 0].double().unflatten(-1, (-1, block)) @ matrix).flatten(1)
    step = turned.abs().amax(dim=-1, keepdim=True) / 127
    turned = (turned / step).round() * step
    numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).double() - 8
    keys = (numbers * scales.double()[..., None])[0].repeat_interleave(query.shape[1] // codes.shape[1], 0)
    return (keys @ turned[..., None])[..., 0].softmax(-1).sum(0)[None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("group", [1, 2, 3, 7])
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


@pytest.mark.skipif(missing is not None or "avx512vnni" not in extension.levels(), reason="no such machine")
@pytest.mark.parametrize("dim", DIMS)
def test_products_are_integers_whichever_instruction_adds_them(dim):
    codes, scales = stored(dim, False)
    codes[0, 0, 1], scales[0, 0, 1] = 255, 1e-3  # the largest sums
    query = drawn(1, 6, 1, dim, seed=1)
    query[0, 0] = 0
    query[0, 0, 0, 0] = 5.0  # turned: all channels alike
    before, votes = extension.level(), []
    try:
        for name in ("avx512vnni", "avx512"):
            extension.use_level(name)
            votes.append(head_vote(query, codes, keys_scale=scales, impl="native"))
    finally:
        extension.use_level(before)
    assert torch.equal(*votes) and votes[0].count_nonzero() > 100


@pytest.mark.parametrize("alike", [1, 40])
@pytest.mark.parametrize("top_k", [1, 100, 900, 3000])
def test_the_best_of_many_slots(level, top_k, alike):
    """With `alike` votes each of the same size; of equal ones the later is taken."""
    sinks, local, slots = 3, 7, 6011
    kept = torch.arange(slots) // alike
    keys = drawn(1, 2, slots, 16)[:, :, kept]
    query = drawn(1, 4, 1, 16, seed=1)
    prepared = PreparedVote(query, keys, None, threshold=2, sinks=sinks, top_k=top_k, local=local)
    index, _ = prepared.choose(query, slots)
    part = slice(sinks, slots - local)
    votes = head_vote(query, keys[:, :, part], impl="native")[0]
    order = sorted(range(len(votes)), key=lambda i: (votes[i].item(), i))
    chosen = sorted(i + sinks for i in order[-top_k:])
    assert index[0, 0].tolist() == [*range(sinks), *chosen, *range(slots - local, slots)]
    assert (len(votes.unique()) < len(votes) / 2) == (alike > 1)
