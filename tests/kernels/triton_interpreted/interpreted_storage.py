"""Compaction and rotation, interpreted."""

from __future__ import annotations

import pytest
import torch

from kvpress.kernels.compaction.triton import compact
from kvpress.kernels.rotation.triton import rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dim", [16, 80])
def test_compaction_copies_bits(generator, dtype, heads, dim):
    slots = (torch.randn(2, 70, 3, dim, generator=generator) * 40).to(dtype).transpose(1, 2)
    index = torch.randint(0, 70, (2, heads, 41), generator=generator)
    index[:, :, 7] = -1
    kept = compact(slots, index)
    assert kept.shape == (2, 3, 41, dim) and kept.dtype == dtype and kept.is_contiguous()
    for batch in range(2):
        for head in range(3):
            for place, slot in enumerate(index[batch, head % heads].tolist()):
                expected = slots[batch, head, slot] if slot >= 0 else torch.zeros(dim, dtype=dtype)
                assert torch.equal(kept[batch, head, place], expected)


def test_compaction_of_positions(generator):
    positions = torch.arange(70).view(1, 1, -1).expand(1, 2, 70)
    index = torch.tensor([[[3, 9], [60, 1]]])
    assert compact(positions, index).tolist() == [[[3, 9], [60, 1]]]
    assert compact(positions, index[..., :0]).shape == (1, 2, 0)


def test_compaction_beyond_two_to_the_31(generator, reserved):
    far = reserved(2**32 + 2**10).as_strided((1, 2, 5, 16), (0, 2**31 + 64, 2**29, 1))
    far.copy_(torch.randn(1, 2, 5, 16, generator=generator))
    index = torch.tensor([[[4, 0], [1, 4]]])
    assert torch.equal(compact(far, index), far.gather(2, index[..., None].expand(1, 2, 2, 16)))


@pytest.mark.parametrize("rotary", [80, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(generator, within_budget, rotary, dtype):
    slots = torch.randn(2, 3, 70, 80, generator=generator).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    angles = (torch.rand(2, 1, 70, rotary // 2, generator=generator) * 6).repeat(1, 1, 1, 2)

    def turned(kind):
        part, rest = slots[..., :rotary].to(kind), slots[..., rotary:].to(kind)
        half = torch.cat([-part[..., rotary // 2 :], part[..., : rotary // 2]], -1)
        return torch.cat([part * angles.cos().to(kind) + half * angles.sin().to(kind), rest], -1)

    output = rotate(slots, angles.cos(), angles.sin())
    within_budget(output, turned(torch.float64), turned(torch.float32).to(dtype))
    assert torch.equal(output[..., rotary:], slots[..., rotary:]) and not torch.equal(output, slots)
    if dtype == torch.float32:
        torch.testing.assert_close(rotate(output, angles.cos(), angles.sin(), inverse=True), slots, atol=2e-6, rtol=0)


def test_rotation_sizes_are_checked():
    with pytest.raises(ValueError, match="rotary_dim must be even and at most dim"):
        rotate(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16))
