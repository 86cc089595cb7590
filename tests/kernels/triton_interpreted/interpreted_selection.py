"""Head vote and pages, interpreted, against fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kvpress.kernels.head_vote.triton import head_vote
from kvpress.kernels.packing import pack_int4
from kvpress.kernels.pages import reference
from kvpress.kernels.pages.triton import page_bounds, page_scores
from kvpress.kernels.rotation import rotate
from kvpress.kernels.rotation.prepared import PreparedRotation
from kvpress.row_format import Int8Rows
from kvpress.testing.hadamard_oracle import hadamard


def one_after_the_other(query, keys):
    """Dot products `[batch, kv_heads, group, slots]`, summed channel by channel in the type of `query`."""
    scores = query.new_zeros(*query.shape[:3], keys.shape[2])
    for channel in range(query.shape[-1]):
        scores = scores + query[..., channel, None] * keys[:, :, None, :, channel]
    return scores


def softmax_votes(query, keys, positions=None, products=partial(torch.einsum, "bhgd,bhsd->bhgs")):  # noqa: B008
    """TokenSelect's soft vote in the type of `query`: no scaling, `h // group`."""
    batch, _, _, dim = query.shape
    kv_heads = keys.shape[1]
    scores = products(query.view(batch, kv_heads, -1, dim), keys)
    if positions is not None:
        scores = scores.masked_fill(positions[:, :, None] < 0, -torch.inf)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)).nan_to_num(0).sum((1, 2))


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("splits", [1, 3])
def test_head_vote(generator, within_budget, group, splits):
    query = torch.randn(2, 3 * group, 1, 80, generator=generator)
    keys = torch.randn(2, 3, 270, 80, generator=generator)
    positions = torch.arange(270).view(1, 1, -1).repeat(2, 1, 1)
    positions[:, :, :9] = positions[0, :, 200:] = -1
    votes = head_vote(query, keys, positions=positions, splits=splits)
    exact = softmax_votes(query.double(), keys.double(), positions)
    # a dot product's error depends on the order of its sum, which is the library's own: one number after the other is the worst of them
    rounded = softmax_votes(query, keys, positions, products=one_after_the_other)
    within_budget(votes, exact, rounded)
    assert (votes[:, :9] == 0).all()
    torch.testing.assert_close(votes.sum(-1), torch.full((2,), 3.0 * group))


def test_int8_index_of_keys(generator, within_budget):
    query = torch.randn(1, 4, 1, 32, generator=generator)
    keys = torch.randint(-127, 128, (1, 2, 70, 32), generator=generator, dtype=torch.int8)
    scale = torch.rand(1, 2, 70, generator=generator) * 0.02
    votes = head_vote(query, keys, keys_scale=scale)
    whole = keys * scale[..., None]
    exact = softmax_votes(query.double(), keys.double() * scale[..., None].double())
    within_budget(votes, exact, softmax_votes(query, whole))


@pytest.mark.parametrize("dim", [16, 80, 96, 256])
def test_packed_int4_keys(generator, within_budget, dim):
    query = torch.randn(2, 6, 1, dim, generator=generator) / dim**0.5
    packed = pack_int4(torch.randn(2, 2, 70, dim, generator=generator))
    stored, scale = Int8Rows().parts(packed)
    votes = head_vote(query, stored, keys_scale=scale, splits=2)
    codes = torch.stack([stored % 16, stored // 16], dim=-1).flatten(-2).float() - 8
    turned = query.double() @ hadamard(dim) * (dim & -dim) ** 0.5
    step = turned.abs().amax(-1, keepdim=True) / 127
    asked = (turned / step).round() * step
    exact = softmax_votes(asked, codes.double() * scale[..., None].double())
    within_budget(votes, exact, softmax_votes(asked.float(), codes * scale[..., None], products=one_after_the_other))
    assert not torch.allclose(votes, softmax_votes(query, codes * scale[..., None]), rtol=1e-3)


def test_nobody_votes_for_nothing(generator):
    query, keys = torch.randn(1, 4, 1, 16, generator=generator), torch.randn(1, 2, 20, 16, generator=generator)
    assert (head_vote(query, keys, positions=torch.full((1, 1, 20), -1)) == 0).all()
    assert head_vote(query, keys[:, :, :0]).shape == (1, 0)
    with pytest.raises(ValueError, match="single row"):
        head_vote(query.expand(1, 4, 2, 16), keys)


def outwards(bound, towards):
    """The bfloat16 number next to `bound` in the direction of an infinity, unless `bound` is one; of other types itself."""
    if bound.dtype != torch.float32:
        return bound
    near = bound.bfloat16()
    inside = near.float() > bound if towards < 0 else near.float() < bound
    return torch.where(inside, near.nextafter(torch.tensor(towards, dtype=torch.bfloat16)), near)


@pytest.mark.parametrize("page_size", [16, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_bounds_are_the_tightest(generator, page_size, dtype):
    keys = torch.randn(2, 2, 50, 20, generator=generator)
    keys[..., 0] *= 1e-40 if dtype == torch.float32 else 1.0  # the interpreter makes denormal bfloat16 numbers 0
    keys[..., 1], keys[..., 2] = keys[..., 1].bfloat16(), 3.4e38 * keys[..., 2].sign()
    keys = keys.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    positions = torch.arange(50).view(1, 1, -1).repeat(1, 2, 1)
    positions[:, 1, 10:45] = -1
    lowest, highest = page_bounds(keys, page_size=page_size, positions=positions)
    assert lowest.shape == highest.shape == (2, 2, -(-50 // page_size), 20)
    for head in range(2):
        for page in range(lowest.shape[2]):
            slots = [s for s in range(page * page_size, min(50, (page + 1) * page_size)) if positions[0, head, s] >= 0]
            inside = keys[:, head, slots]
            low = inside.amin(1) if slots else torch.full((2, 20), torch.inf, dtype=dtype)
            high = inside.amax(1) if slots else torch.full((2, 20), -torch.inf, dtype=dtype)
            low, high = outwards(low, -torch.inf), outwards(high, torch.inf)
            assert torch.equal(lowest[:, head, page], low) and torch.equal(highest[:, head, page], high)
    anew = reference.page_bounds(keys, page_size, positions)
    assert torch.equal(lowest.view(torch.int16), anew[0].view(torch.int16))
    assert torch.equal(highest.view(torch.int16), anew[1].view(torch.int16))
    assert lowest.dtype == torch.bfloat16
    assert (highest[..., 2] == torch.inf).any(), "3.4e38 lies above every bfloat16 number"


@pytest.mark.parametrize("group", [1, 3])
def test_page_scores_bound_every_slot(generator, within_budget, group):
    query = torch.randn(2, 2 * group, 1, 80, generator=generator)
    keys = torch.randn(2, 2, 16 * 37, 80, generator=generator)
    lowest, highest = keys.unflatten(2, (37, 16)).amin(3), keys.unflatten(2, (37, 16)).amax(3)
    lowest[0, 0, 4], highest[0, 0, 4] = torch.inf, -torch.inf

    def bound(kind):
        asked = query.to(kind).view(2, 2, group, 1, 80)
        at_least, at_most = lowest.to(kind)[:, :, None], highest.to(kind)[:, :, None]
        total = torch.maximum(asked * at_least, asked * at_most).sum(-1)
        total[0, 0, :, 4] = -torch.inf
        return total.reshape(2, 2 * group, 37)

    scores = page_scores(query, lowest, highest)
    within_budget(scores, bound(torch.float64), bound(torch.float32))
    dots = torch.einsum("bhgd,bhsd->bhgs", query.view(2, 2, group, 80), keys).reshape(2, 2 * group, 37, 16)
    held = torch.isfinite(scores)
    assert (scores[held][:, None] >= dots[held] - 1e-4).all() and held.sum() == scores.numel() - group


def test_page_size_is_checked(generator):
    with pytest.raises(ValueError, match="page_size must be from 1 to 128, got 0"):
        page_bounds(torch.zeros(1, 1, 4, 16), page_size=0)


def test_rows_are_rotated_into_a_buffer(generator):
    buffer, rows = torch.randn(2, 3, 9, 24, generator=generator), torch.randn(2, 1, 3, 24, generator=generator)
    rows, before = rows.transpose(1, 2), buffer.clone()
    angles = torch.randn(2, 1, 1, 8, generator=generator).repeat(1, 1, 1, 2)
    turning = PreparedRotation(angles.cos(), angles.sin(), inverse=True)
    assert turning.rotate_into(buffer, 5, rows)
    assert torch.equal(buffer[:, :, 5:6], rotate(rows, angles.cos(), angles.sin(), inverse=True, impl="triton"))
    assert not torch.equal(buffer[:, :, 5], rows[:, :, 0])
    buffer[:, :, 5] = before[:, :, 5]
    assert torch.equal(buffer, before)
