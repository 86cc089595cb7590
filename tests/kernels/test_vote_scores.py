"""Head vote over scores that are prescribed: what a running softmax over tiles and pieces of them could get wrong."""

import pytest
import torch

from kvpress.kernels.head_vote import head_vote
from kvpress.testing.slots_oracle import assert_within_budget, rejected

SLOTS, TILE = 4500, 64  # two whole pieces of 32 tiles and one that is not, nor its last tile
SCALES = torch.tensor([1.0, 0.5, -0.25])  # of the query heads of a KV head: its scores times these


def drawn():
    return torch.randn(SLOTS, generator=torch.Generator().manual_seed(0))


def with_one(at, score):
    return drawn().index_fill(0, torch.tensor([at]), score)


FINITE = {
    "random": drawn(),
    "rising": torch.arange(SLOTS) / 50,
    "rising by more than the range of exp": torch.arange(SLOTS).float() * 3,
    "falling": -torch.arange(SLOTS) / 50,
    "rising within each tile, falling from tile to tile": (torch.arange(SLOTS) % TILE)
    - torch.arange(SLOTS) // TILE / 2.0,
    "one far above, late": with_one(SLOTS - 1, 1e4),
    "one far above, first": with_one(0, 1e4),
    "one far above, last of a piece": with_one(32 * TILE - 1, 300.0),
    "one far below": with_one(70, -1e30),
    "the largest numbers": with_one(4000, 3e38),
    "equal": torch.full((SLOTS,), 7.0),
    "equal, far from zero": torch.full((SLOTS,), -3e4),
    "steps as large as the range of exp": (torch.arange(SLOTS) // TILE % 5) * 88.0,
    "none before the third tile": drawn().index_fill(0, torch.arange(2 * TILE + 5), -torch.inf),
    "a tile of none between": drawn().index_fill(0, torch.arange(5 * TILE, 6 * TILE), -torch.inf),
}


def asked(scores, scales):
    """Query and keys `[1, 1, …]` whose products are `scores` times `scales`, exactly."""
    query, keys = torch.zeros(1, len(scales), 1, 8), torch.zeros(1, 1, SLOTS, 8)
    query[0, :, 0, 3], keys[0, 0, :, 3] = scales, scores
    return query, keys


def expected(scores, scales):
    return (scores.double() * scales.double()[:, None]).softmax(-1).sum(0)[None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FINITE)
def test_votes_of_prescribed_scores(level, poisoned, name, threads):
    scores = FINITE[name]
    scales = SCALES if scores.isfinite().all() else SCALES[:2]  # minus nothing would be everything
    query, keys = asked(scores, scales)
    exact, low = expected(scores, scales), head_vote(query, keys, impl="reference")
    torch.set_num_threads(threads)
    found = head_vote(query, keys, impl="native")
    assert_within_budget(found, low, exact)
    assert abs(exact.sum() - len(scales)) < 1e-9 and abs(found.double().sum() - len(scales)) < 1e-4
    found[0, exact.argmax()] *= 1.001  # a weight that does not fit the others
    assert rejected(assert_within_budget, found, low, exact)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("at", [0, 100, SLOTS - 1])
def test_a_score_that_is_no_number_leaves_no_votes_of_its_head(level, impl, at):
    query, keys = asked(with_one(at, torch.nan), SCALES[:2])
    assert head_vote(query, keys, impl=impl).isnan().all()
