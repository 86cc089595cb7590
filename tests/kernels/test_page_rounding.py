"""Bounds of fp32 keys in bfloat16: they contain every key, none is tighter, and scores by them bound every dot product."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from kvpress.kernels.pages import bounds_type, choose_pages, page_bounds, page_scores

SIZE, DIM = 8, 40
LARGEST = 3.3895313892515355e38  # of bfloat16
# the value of each 16-bit pattern, as fp64; NaN left out, both zeros are one number
GRID = sorted(
    {struct.unpack("f", struct.pack("I", bits << 16))[0] for bits in range(1 << 16) if bits & 0x7FFF <= 0x7F80}
)
STEPS = torch.tensor(GRID, dtype=torch.float64)


def below(exact: Tensor) -> Tensor:
    """The largest bfloat16 numbers that are not above `exact`, by search among all of them."""
    return STEPS[torch.searchsorted(STEPS, exact.double(), right=True) - 1]


def above(exact: Tensor) -> Tensor:
    """The smallest that are not below."""
    return STEPS[torch.searchsorted(STEPS, exact.double())]


def awkward_keys() -> Tensor:
    """`[2, 3, 61, 40]`: ordinary numbers, and channels of those near which rounding goes wrong."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 3, 61, DIM, generator=generator)
    bits = torch.randint(0, 1 << 31, (2, 3, 61, 8), generator=generator, dtype=torch.int32)
    any_magnitude = bits.view(torch.float32)
    keys[..., 8:16] = torch.where(any_magnitude.isfinite(), any_magnitude, 1.0) * keys[..., 8:16].sign()
    exact = torch.randn(2, 3, 61, 4, generator=generator).bfloat16().float()
    keys[..., 16:20] = exact  # nothing to round,
    keys[..., 20:24] = exact.nextafter(torch.tensor(torch.inf))  # a bit beyond
    keys[..., 24:28] = exact.nextafter(torch.tensor(-torch.inf))
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.17e-38, -1.17e-38, 9.2e-41, -9.2e-41])
    huge = torch.tensor([LARGEST, -LARGEST, 3.4028234663852886e38, -3.4028234663852886e38])
    keys[..., 28] = tiny[torch.randint(0, 8, (2, 3, 61), generator=generator)]
    keys[..., 29] = tiny[1::2][torch.randint(0, 4, (2, 3, 61), generator=generator)]  # none above zero
    keys[..., 30] = huge[torch.randint(0, 4, (2, 3, 61), generator=generator)]
    keys[1, 2, 5, 31], keys[1, 2, 6, 31] = torch.inf, -torch.inf
    return keys


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_bounds_are_the_tightest_that_contain_every_key(level: str, poisoned: list[int], impl: str) -> None:
    keys = awkward_keys()
    positions = torch.arange(61).expand(2, 1, 61).clone()
    positions[0, :, SIZE : 2 * SIZE] = -1  # a page without a token
    keys[0, :, SIZE] = torch.nan  # which nobody sees
    low, high = page_bounds(keys, page_size=SIZE, positions=positions, impl=impl)
    assert low.dtype == high.dtype == bounds_type(torch.float32) == torch.bfloat16
    compared = rounded = 0
    for page in range(math.ceil(61 / SIZE)):
        inside = slice(page * SIZE, (page + 1) * SIZE)
        for row in range(2):
            own_low, own_high = low[row, :, page].double(), high[row, :, page].double()
            if row == 0 and page == 1:
                assert (own_low == torch.inf).all() and (own_high == -torch.inf).all()
                continue
            own = keys[row, :, inside].double()
            assert (own_low[:, None] <= own).all() and (own <= own_high[:, None]).all()
            assert torch.equal(own_low, below(own.amin(1))) and torch.equal(own_high, above(own.amax(1)))
            compared += own_low.numel()
            rounded += int((own_low != own.amin(1)).sum() + (own_high != own.amax(1)).sum())
    assert compared == 15 * 3 * DIM and rounded > compared
    assert high[1, 2, 0, 31] == torch.inf and low[1, 2, 0, 31] == -torch.inf
    assert (high[..., 30].double() == torch.inf).any(), "the largest fp32 number lies above every bfloat16 one"


def test_implementations_agree(level: str) -> None:
    keys = awkward_keys()
    keys[0, 0, 3, 7] = torch.nan
    found = [page_bounds(keys, page_size=SIZE, impl=impl) for impl in ("native", "reference")]
    for own, other in zip(*found, strict=True):
        assert own.isnan().sum() == 1
        assert torch.equal(own.isnan(), other.isnan())
        assert torch.equal(
            own.nan_to_num(nan=1.0), other.nan_to_num(nan=1.0)
        )  # of two zeros torch releases choose one or the other


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_keys_keep_their_type(kind: torch.dtype) -> None:
    keys = torch.randn(1, 2, 30, DIM, generator=torch.Generator().manual_seed(1)).to(kind)
    low, high = page_bounds(keys, page_size=30)
    assert low.dtype == high.dtype == bounds_type(kind) == kind
    assert torch.equal(low[:, :, 0], keys.amin(2)) and torch.equal(high[:, :, 0], keys.amax(2))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_scores_bound_every_dot_product(level: str, impl: str) -> None:
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(1, 2, 64, DIM, generator=generator) * torch.logspace(-3, 3, DIM)
    query = torch.randn(1, 6, 1, DIM, generator=generator)
    query[..., 3], query[..., 4] = 0.0, -0.0
    low, high = page_bounds(keys, page_size=SIZE, impl=impl)
    scores = page_scores(query, low, high, impl=impl).double().view(2, 3, 8)
    products = torch.einsum("hgd,hsd->hgs", query.double().view(2, 3, DIM), keys[0].double()).view(2, 3, 8, SIZE)
    error = torch.einsum(
        "hgd,hpd->hgp", query.double().abs().view(2, 3, DIM), high[0].double().abs().maximum(low[0].double().abs())
    )
    assert (products.amax(-1) <= scores + error * DIM * 2.0**-24).all()
    exact = torch.einsum(
        "hgpd,hgd->hgp",
        torch.where(query.view(2, 3, 1, DIM) < 0, low[0, :, None].float(), high[0, :, None].float()).double(),
        query.double().view(2, 3, DIM),
    )
    assert ((scores - exact).abs() <= error * DIM * 2.0**-24).all()
    assert (scores > products.amax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("impl", ["apart", "native"])
def test_a_key_widens_outwards(level: str, impl: str) -> None:
    """Token by token, the last page's bounds are those made anew, whatever the key."""
    keys, query = awkward_keys(), torch.randn(2, 6, 1, DIM, generator=torch.Generator().manual_seed(2))
    low, high = (torch.full((2, 3, 8, DIM), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    changed = 0
    for slots in range(1, 62):
        pages = math.ceil(slots / SIZE)
        before = low.clone()
        choose_pages(
            query,
            low[:, :, :pages],
            high[:, :, :pages],
            1,
            page_size=SIZE,
            slots=slots,
            key=keys[:, :, slots - 1 : slots],
            impl=impl,
        )
        changed += not torch.equal(before[:, :, :pages], low[:, :, :pages])
        for own, anew in zip(
            (low, high), page_bounds(keys[:, :, :slots], page_size=SIZE, impl="reference"), strict=True
        ):
            assert torch.equal(own[:, :, :pages], anew)
    assert changed > 40
    with pytest.raises(ValueError, match=r"of a type with bounds in torch\.bfloat16, got .* of torch\.float16"):
        choose_pages(query, low, high, 1, page_size=SIZE, slots=61, key=keys[:, :, 60:].half(), impl=impl)
