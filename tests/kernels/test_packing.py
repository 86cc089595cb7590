"""Rows packed to int8: the compiled kernel equals the formula, bit for bit, at every instruction set."""

import math

import pytest
import torch

from kvpress.kernels.native import extension, missing
from kvpress.kernels.packing import SCALE_BYTES, pack_int8

LEVELS = [] if missing is not None else extension.levels()


@pytest.fixture(params=LEVELS)
def level(request):
    before = extension.level()
    extension.use_level(request.param)
    yield request.param
    extension.use_level(before)


def rows(shape, kind=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]).to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 65, 64), (1, 1, 1, 4), (5, 7, 80), (9, 128), (1, 2, 33, 256)], ids=str)
def test_it_is_the_reference_bit_for_bit(level, shape, kind):
    given = rows(shape, kind)
    assert torch.equal(pack_int8(given, impl="native"), pack_int8(given, impl="reference"))


def test_strides_threads_and_what_is_no_number(level):
    given = rows((2, 40, 3, 64)).transpose(1, 2)
    given[0, 0, 0], given[1, 2, 5, 3], given[1, 1, 7, 0] = 0, math.nan, math.inf
    expected = pack_int8(given, impl="reference")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found = pack_int8(given, impl="native")
        finally:
            torch.set_num_threads(1)
        ours, theirs = (each[..., 64:].view(torch.float32) for each in (found, expected))
        assert torch.equal(ours.isnan(), theirs.isnan()) and int(ours.isnan().sum()) == 1
        fine = theirs.isfinite().expand_as(found[..., :64])
        assert torch.equal(found[..., :64][fine], expected[..., :64][fine])
        assert torch.equal(ours[ours.isfinite()], theirs[theirs.isfinite()])


def test_numbers_come_back_within_half_a_level():
    given = rows((2, 3, 50, 64)).double()
    packed = pack_int8(given.float())
    scale = packed[..., 64:].view(torch.float32).double()
    error = (packed[..., :64].double() * scale - given.float().double()).abs()
    assert bool((error <= scale * 0.5000001).all()) and float((error / scale).max()) > 0.49
    assert int(packed[..., :64].abs().amax(dim=-1).min()) == 127, "the largest of a row is the last level"
    assert packed.shape[-1] == 64 + SCALE_BYTES


def test_refusals():
    with pytest.raises(ValueError, match="multiples of 4, got 6"):
        pack_int8(torch.zeros(1, 1, 1, 6))
    with pytest.raises(ValueError, match="impl of packing"):
        pack_int8(torch.zeros(1, 1, 1, 8), impl="fast")
    if missing is None:
        with pytest.raises(ValueError, match=r"cannot be used: .*float64"):
            pack_int8(torch.zeros(1, 1, 1, 8, dtype=torch.float64), impl="native")
