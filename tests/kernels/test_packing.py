"""Rows packed to int8 and int4: the compiled kernel equals the formula, bit for bit, at every instruction set."""

import math

import pytest
import torch

from kvpress.kernels.native import extension, missing
from kvpress.kernels.packing import SCALE_BYTES, pack_int4, pack_int8
from kvpress.testing.hadamard_oracle import hadamard

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


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 65, 64), (1, 1, 1, 8), (5, 7, 80), (9, 128), (2, 9, 96), (1, 2, 33, 256)], ids=str
)
def test_int4_rows_are_the_reference_bit_for_bit(level, shape, kind):
    given = rows(shape, kind)
    centre = torch.randn(*shape[:-2], shape[-1], generator=torch.Generator().manual_seed(1))
    for middle in (None, centre, centre.bfloat16()):
        packed = pack_int4(given, middle, impl="native")
        assert packed.shape == (*shape[:-1], shape[-1] // 2 + SCALE_BYTES) and packed.dtype == torch.uint8
        assert torch.equal(packed, pack_int4(given, middle, impl="reference"))


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_int4_codes_are_those_of_turned_rows(level, impl, dim):
    given, centre = rows((2, 3, 50, dim)), torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(1))
    given[0, 0, 0] = centre[0, 0]
    packed = pack_int4(given, centre, impl=impl)
    codes = torch.stack([packed[..., : dim // 2] % 16, packed[..., : dim // 2] // 16], dim=-1).flatten(-2).double() - 8
    scale = packed[..., dim // 2 :].contiguous().view(torch.float32).double()
    block = dim & -dim
    turned = (given - centre[:, :, None]).double() @ hadamard(dim) * block**0.5
    error = (codes * scale * block - turned).abs() / (scale * block).clamp(min=1e-300)
    assert float(error.max()) < 0.50001 and float(error.max()) > 0.45
    magnitudes = codes.abs().amax(dim=-1)
    assert int(magnitudes[0, 0, 0]) == 0 == float(scale[0, 0, 0]) and set(magnitudes.flatten().tolist()) == {0, 7}


def test_int4_rows_with_what_is_no_number(level):
    given = rows((2, 40, 3, 64)).transpose(1, 2)
    given[0, 0, 0], given[1, 2, 5, 3], given[1, 1, 7, 0] = 0, math.nan, math.inf
    found, expected = (pack_int4(given, impl=impl) for impl in ("native", "reference"))
    ours, theirs = (each[..., 32:].view(torch.float32) for each in (found, expected))
    unknown = ~ours.isfinite()
    assert torch.equal(unknown, ~theirs.isfinite())
    assert unknown.nonzero()[:, :3].tolist() == [[1, 1, 7], [1, 2, 5]]
    assert torch.equal(found[~unknown[..., 0]], expected[~unknown[..., 0]])


def test_refusals():
    with pytest.raises(ValueError, match="multiples of 8, got 12"):
        pack_int4(torch.zeros(1, 1, 1, 12))
    with pytest.raises(ValueError, match=r"centre must have the shape .*\(1, 2, 8\), got \(1, 2, 4\)"):
        pack_int4(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="multiples of 4, got 6"):
        pack_int8(torch.zeros(1, 1, 1, 6))
    with pytest.raises(ValueError, match="impl of packing"):
        pack_int8(torch.zeros(1, 1, 1, 8), impl="fast")
    if missing is None:
        with pytest.raises(ValueError, match=r"cannot be used: .*float64"):
            pack_int8(torch.zeros(1, 1, 1, 8, dtype=torch.float64), impl="native")
