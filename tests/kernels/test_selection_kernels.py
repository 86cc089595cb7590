"""Head vote, pages, rotation: reference and native against oracles that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpress.kernels.attention import attend
from kvpress.kernels.head_vote import head_vote
from kvpress.kernels.packing import pack_int4, pack_int8
from kvpress.kernels.pages import page_bounds, page_scores
from kvpress.kernels.rotation import rotate
from kvpress.row_format import Int8Rows
from kvpress.testing.hadamard_oracle import hadamard
from kvpress.testing.slots_oracle import assert_within_budget, oracle, rejected


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("slots", [1, 63, 65, 2049])
def test_head_vote(level: str, group: int, slots: int, poisoned: list[int]) -> None:
    query, keys = made(2, 2 * group, 1, 80), made(2, 2, slots, 80, seed=1)
    positions = torch.arange(slots).expand(2, 1, slots).clone()
    positions[:, :, 1::7] = -1
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (keys, {}),
        (keys, {"scaling": 0.1, "positions": positions, "query_positions": torch.tensor([[slots // 2], [-1]])}),
    ]
    if slots == 65:
        ragged = {"starts": torch.tensor([[0, 9], [3, 4]]), "lengths": torch.tensor([[60, 5], [33, 0]])}
        cases.append((keys[0, 0], ragged))
    for own, options in cases:
        options.setdefault("scaling", 1.0)
        exact = oracle(query, own, own, **options)[2].sum(dim=(1, 2))
        low = head_vote(query, own, impl="reference", **options)
        found = head_vote(query, own, impl="native", **options)
        assert exact.max() > 0
        assert_within_budget(found, low, exact)
    if slots > 1:
        assert rejected(assert_within_budget, head_vote(query, keys, scaling=0.9, impl="native"), low, exact)


def test_head_vote_of_int8_keys(level: str, poisoned: list[int]) -> None:
    query, keys = made(1, 8, 1, 64), made(1, 2, 300, 64, seed=1)
    scale = keys.abs().amax(-1) / 127
    stored = (keys / scale[..., None]).round().to(torch.int8)
    exact = oracle(query, stored, keys, scaling=1.0, keys_scale=scale)[2].sum(dim=(1, 2))
    low = head_vote(query, stored, keys_scale=scale, impl="reference")
    assert_within_budget(head_vote(query, stored, keys_scale=scale, impl="native"), low, exact)


def int4_votes(
    query: Tensor, stored: Tensor, scale: Tensor, *, kind: torch.dtype = torch.float64, swapped: bool = False
) -> Tensor:
    """Codes, read from the low half first, times queries that are turned and rounded once more; whole numbers are multiplied, and what
    follows is done in `kind`."""
    kv_heads, dim = stored.shape[1], query.shape[-1]
    halves = [stored % 16, stored // 16]
    codes = torch.stack(halves[::-1] if swapped else halves, dim=-1).flatten(-2).double() - 8
    turned = (query.double() @ hadamard(dim) * (dim & -dim) ** 0.5).unflatten(1, (kv_heads, -1))
    step = turned.abs().amax(-1, keepdim=True) / 127
    products = torch.einsum("bhgrd,bhsd->bhgrs", (turned / step).round(), codes)
    scores = products.to(kind) * (step.to(kind) * scale.to(kind)[:, :, None, None])
    return scores.softmax(-1).sum((1, 2, 3))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("dim", "slots"), [(64, n) for n in (1, 15, 16, 17, 63, 65, 1000, 4097)]
                         + [(8, 70), (24, 65), (40, 33), (80, 1000), (96, 65), (128, 300), (256, 65), (512, 20)])  # fmt: skip
def test_head_vote_of_int4_keys(level: str, group: int, dim: int, slots: int, poisoned: list[int]) -> None:
    query = made(2, 2 * group, 1, dim)
    packed = pack_int4(made(2, 2, slots, dim, seed=1) * torch.linspace(0.1, 2, slots)[:, None])
    stored, scale = Int8Rows().parts(packed)
    exact, low = int4_votes(query, stored, scale), int4_votes(query, stored, scale, kind=torch.float32)
    found = head_vote(query, stored, keys_scale=scale, impl="native")
    assert_within_budget(found, low, exact)
    reference = head_vote(query, stored, keys_scale=scale, impl="reference")
    assert_within_budget(reference, reference, exact)  # its products are rounded one by one
    if slots > 1:
        for wrong in (int4_votes(query, stored, scale, swapped=True), int4_votes(-query, stored, scale)):
            assert rejected(assert_within_budget, found, low, wrong)
        positions = torch.arange(slots).expand(2, 1, slots).clone()
        positions[:, :, ::3] = -1
        half = {"positions": positions, "scaling": 0.3}
        some = head_vote(query, stored, keys_scale=scale, impl="native", **half)
        rest = positions[0, 0] >= 0
        low, exact = (
            int4_votes(query * 0.3, stored[:, :, rest], scale[:, :, rest], kind=kind)
            for kind in (torch.float32, torch.float64)
        )
        assert_within_budget(some[:, rest], low, exact)
        assert not some[:, ~rest].any()


def test_int4_keys_that_are_no_numbers_vote_as_int8_ones(level: str) -> None:
    query, keys = made(1, 4, 1, 64), made(1, 2, 40, 64, seed=1)
    keys[0, 0, 3, 5] = torch.nan
    for pack in (pack_int8, pack_int4):
        stored, scale = Int8Rows().parts(pack(keys))
        votes = [head_vote(query, stored, keys_scale=scale, impl=impl) for impl in ("native", "reference")]
        assert votes[0].isnan().all() and votes[1].isnan().all()


def test_int4_keys_are_refused_where_they_do_not_fit() -> None:
    stored, scale = Int8Rows().parts(pack_int4(made(1, 2, 40, 64)))
    with pytest.raises(ValueError, match="query and keys must share the last size, got 32 and 64"):
        head_vote(made(1, 4, 1, 32), stored, keys_scale=scale)
    with pytest.raises(ValueError, match="keys_scale must be given"):
        head_vote(made(1, 4, 1, 64), stored)
    with pytest.raises(ValueError, match="cannot be used: native kernels take fp32, bf16, fp16 and int8 slots"):
        attend(made(1, 4, 1, 32), stored, stored, scaling=1.0, impl="native")


@pytest.mark.parametrize("group", [1, 4, 6])
def test_head_vote_over_many_tiles(level: str, group: int, poisoned: list[int]) -> None:
    """Whole tiles without a candidate, scores that grow from tile to tile, packed int8 keys."""
    query, keys = made(1, 2 * group, 1, 32), made(1, 2, 5000, 32, seed=1)
    keys = keys * torch.linspace(0.01, 2, 5000)[:, None]
    stored, scale = Int8Rows().parts(pack_int8(keys))
    positions = torch.arange(5000)[None, None].clone()
    positions[:, :, 100:300] = -1
    positions[:, :, 2040:4100] = -1
    options: dict[str, Any] = {"scaling": 1.0, "positions": positions, "query_positions": torch.tensor([[4900]])}
    for own, more in ((keys, options), (stored, options | {"keys_scale": scale})):
        exact = oracle(query, own, own, **more)[2].sum(dim=(1, 2))
        low = head_vote(query, own, impl="reference", **more)
        found = head_vote(query, own, impl="native", **more)
        assert (exact > 0).sum() == 2641
        assert_within_budget(found, low, exact)
        assert found[0, 100:300].abs().max() == 0 == found[0, 4901:].abs().max()


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("slots", "page_size"), [(1, 16), (63, 16), (64, 16), (65, 8), (200, 128)])
def test_page_bounds(level: str, impl: str, kind: torch.dtype, slots: int, page_size: int, poisoned: list[int]) -> None:
    keys = made(2, 3, slots, 72).bfloat16().to(kind)  # that bfloat16 holds: test_page_rounding.py has the others
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    positions = torch.arange(slots).expand(2, 3, slots).clone()
    positions[:, 1, 2::3] = -1
    positions[1, :, :page_size] = -1  # a page without a token
    lowest, highest = page_bounds(keys, page_size=page_size, positions=positions.int(), impl=impl)
    assert lowest.dtype == (torch.bfloat16 if kind == torch.float32 else kind)
    pages = math.ceil(slots / page_size)
    assert lowest.shape == highest.shape == (2, 3, pages, 72)
    for b in range(2):
        for h in range(3):
            for page in range(pages):
                inside = slice(page * page_size, (page + 1) * page_size)
                own = keys[b, h, inside][positions[b, h, inside] >= 0]
                if len(own):
                    assert torch.equal(lowest[b, h, page], own.amin(0)) and torch.equal(
                        highest[b, h, page], own.amax(0)
                    )
                else:
                    assert (lowest[b, h, page] == torch.inf).all() and (highest[b, h, page] == -torch.inf).all()


@pytest.mark.parametrize("dim", [64, 80, 100, 256])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_page_scores(level: str, dim: int, kind: torch.dtype, poisoned: list[int]) -> None:
    query, keys = made(2, 6, 1, dim), made(2, 2, 90, dim, seed=1).to(kind)
    positions = torch.arange(90).expand(2, 1, 90).clone()
    positions[0, :, 16:32] = -1
    lowest, highest = page_bounds(keys, page_size=16, positions=positions)
    asked = query.double().unflatten(1, (2, 3))
    exact = torch.maximum(asked * lowest.double()[:, :, None], asked * highest.double()[:, :, None]).sum(-1)
    exact = exact.masked_fill((lowest > highest).any(-1)[:, :, None], -torch.inf).nan_to_num(neginf=-torch.inf)
    exact = exact.flatten(1, 2)
    low = page_scores(query, lowest, highest, impl="reference")
    found = page_scores(query, lowest, highest, impl="native")
    assert_within_budget(low, low, exact)
    assert_within_budget(found, low, exact)
    scores = (query.unflatten(1, (2, 3)) * 1.0) @ keys.float().transpose(-1, -2)[:, :, None].squeeze(2)[:, :, None]
    bound = found.unflatten(1, (2, 3)).repeat_interleave(16, dim=-1)[..., :90]
    held = (positions >= 0).expand(2, 2, 90)[:, :, None].expand(bound.shape)
    assert (scores[..., 0, :][held] <= bound[held] + 1e-4).all()


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (96, 96), (128, 64), (256, 256)])
def test_rotation(level: str, impl: str, dim: int, rotary: int, poisoned: list[int]) -> None:
    """Against rotations of the plane written as complex products; the inverse undoes; empty slots stay as they are."""
    slots = made(2, 3, 70, dim)
    angles = torch.outer(torch.arange(200.0).double(), 10000 ** -(torch.arange(0, rotary, 2).double() / rotary))
    cosine, sine = (torch.cat([part, part], dim=-1).float() for part in (angles.cos(), angles.sin()))
    positions = torch.randint(-1, 200, (2, 3, 70), generator=torch.Generator().manual_seed(1))
    positions[:, :, 3] = -1
    half = rotary // 2
    turned = torch.complex(slots[..., :half].double(), slots[..., half:rotary].double())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[positions.clamp(min=0)]
    exact = torch.cat([turned.real, turned.imag, slots[..., rotary:].double()], dim=-1)
    exact = torch.where((positions < 0)[..., None], slots.double(), exact)
    low = rotate(slots, cosine, sine, positions=positions, impl="reference")
    found = rotate(slots, cosine, sine, positions=positions, impl=impl)
    assert_within_budget(found, low, exact)
    back = rotate(found, cosine, sine, positions=positions, inverse=True, impl=impl)
    assert_within_budget(
        back, rotate(low, cosine, sine, positions=positions, inverse=True, impl="reference"), slots.double()
    )
    held = positions.clamp(min=0)
    plain = rotate(slots, cosine[held], sine[held], impl=impl)
    assert torch.equal(plain[positions >= 0], found[positions >= 0])
    assert torch.equal(found[positions < 0], slots[positions < 0])
    assert rejected(assert_within_budget, rotate(slots, cosine, -sine, positions=positions, impl=impl), low, exact)
    narrow = rotate(slots.bfloat16(), cosine, sine, positions=positions, impl=impl)
    torch.testing.assert_close(narrow.float(), exact.float(), rtol=2**-6, atol=2**-5)
    with pytest.raises(IndexError):
        rotate(slots, cosine, sine, positions=positions + 100, impl=impl)
