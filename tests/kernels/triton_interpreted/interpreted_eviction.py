"""The weakest slot, rows written over it, and packing, interpreted: number for number as the reference."""

from __future__ import annotations

import pytest
import torch

from kvpress.kernels.eviction import RowWriter, reference
from kvpress.kernels.eviction.triton import weakest
from kvpress.kernels.packing import pack_int4, pack_int8


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("slots", [1, 5, 64, 1030])
def test_weakest(generator, kind, slots):
    seen = set()
    for trial in range(24):
        scores = torch.randint(-3, 3, (2, 3, slots), generator=generator).float()
        for special in (torch.nan, torch.inf, -torch.inf):
            scores[torch.rand(scores.shape, generator=generator) < 0.1 * (trial % 3)] = special
        positions = torch.rand(2, 3, slots, generator=generator).argsort(-1).to(kind)
        if trial % 4 == 0:
            positions[torch.rand(positions.shape, generator=generator) < 0.01] = -1
        sinks = slots if trial % 7 == 0 else trial % 4
        recent = (None, max(0, slots - 3), slots * 9)[trial % 3]
        found = weakest(scores, positions, sinks, recent, None)
        assert torch.equal(found, reference.weakest(scores, positions, sinks, recent, None)), trial
        seen.update(found.view(-1).tolist())
    assert len(seen) > min(slots - 1, 20)


def test_weakest_with_limits_per_head_and_lengths(generator):
    scores = torch.randn(2, 3, 40, generator=generator)
    positions = torch.rand(2, 1, 40, generator=generator).argsort(-1).int()
    sinks, recent = torch.tensor([[[0], [2], [40]], [[3], [1], [0]]]), torch.tensor([[[30]], [[35]]])
    lengths = torch.tensor([[40, 7, 1], [0, 20, 39]])
    found = weakest(scores, positions, sinks, recent, lengths)
    assert torch.equal(found, reference.weakest(scores, positions, sinks, recent, lengths))
    assert found[1, 0] == -1 and not torch.equal(found, weakest(scores, positions, 0, None, lengths))
    strided = weakest(scores[:, :, ::2], positions[:, :, ::2], 0, None, None)
    assert torch.equal(strided, reference.weakest(scores[:, :, ::2], positions[:, :, ::2], 0, None, None))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_are_written_in_place(generator, flat, dtype):
    """Four columns: more than one launch; sizes of 1 stand for all heads."""
    shapes = [(80,), (12,), (), ()]
    kinds = [dtype, dtype, torch.float32, torch.int32]
    leading = (42,) if flat else (2, 3, 7)
    columns = [torch.zeros(*leading, *shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    starts = torch.arange(0, 42, 7).view(2, 3).flip(-1).contiguous() if flat else None
    slot = torch.tensor([[[0], [6], [3]], [[2], [5], [1]]])
    rows = [
        (torch.randn(2, 3, 1, *shapes[0], generator=generator) * 9)
        .to(dtype)
        .transpose(0, 1)
        .contiguous()
        .transpose(0, 1)
    ]
    rows += [(torch.randn(2, 3, 1, *shapes[1], generator=generator) * 9).to(dtype)]
    rows += [torch.full((1, 1), 2.5), torch.tensor([[3], [4]], dtype=torch.int32)]
    twins = [column.clone() for column in columns]
    RowWriter(columns, (2, 3), starts, impl="triton").write(slot, rows)
    RowWriter(twins, (2, 3), starts, impl="reference").write(slot, rows)
    for column, twin in zip(columns, twins, strict=True):
        assert torch.equal(column, twin) and int((column != 0).sum()) > 0
    for impl, given in (("triton", columns), ("reference", twins)):
        rows[0] = rows[0].repeat_interleave(2, -1)[..., ::2]  # not side by side
        RowWriter(given, (2, 3), starts, impl=impl).write(4, rows)  # one number for all heads
    for column, twin in zip(columns, twins, strict=True):
        assert torch.equal(column, twin)
    RowWriter(columns, (2, 3), starts, impl="triton").write(torch.full_like(slot, -1), [row + 1 for row in rows])
    assert all(torch.equal(column, twin) for column, twin in zip(columns, twins, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 65, 64), (1, 1, 1, 4), (5, 7, 80), (9, 128), (1, 2, 33, 256)], ids=str)
def test_packing_is_the_reference_bit_for_bit(generator, kind, shape):
    given = (torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]).to(kind)
    given[..., -1, :] = 0
    assert torch.equal(pack_int8(given, impl="triton"), pack_int8(given, impl="reference"))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 65, 64), (1, 1, 1, 8), (5, 7, 80), (9, 128), (2, 9, 96), (1, 2, 33, 256)], ids=str
)
def test_int4_packing_is_the_reference_bit_for_bit(generator, kind, shape):
    given = (torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]).to(kind)
    given[..., -1, :] = 0
    centre = torch.randn(*shape[:-2], shape[-1], generator=generator)
    for middle in (None, centre):
        found = pack_int4(given, middle, impl="triton")
        assert torch.equal(found, pack_int4(given, middle, impl="reference"))
        assert found.float().std() > 1


def test_packing_of_strided_rows_and_of_what_is_no_number(generator):
    given = torch.randn(2, 40, 3, 64, generator=generator).transpose(1, 2)
    given[1, 2, 5, 3] = torch.nan
    found, expected = pack_int8(given, impl="triton"), pack_int8(given, impl="reference")
    ours, theirs = (each[..., 64:].view(torch.float32) for each in (found, expected))
    assert torch.equal(ours.isnan(), theirs.isnan()) and int(ours.isnan().sum()) == 1
    fine = ~theirs.isnan().expand_as(found[..., :64])
    assert torch.equal(found[..., :64][fine], expected[..., :64][fine])
