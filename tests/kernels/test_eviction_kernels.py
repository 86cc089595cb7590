"""Weakest slot, overwriting and compaction: reference and native against loops, number for number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvpress.kernels.compaction import compact
from kvpress.kernels.eviction import RowWriter, weakest

IMPLEMENTATIONS = ["reference", "native"]


def choice(scores: list[float], positions: list[int], sinks: int, first_recent: float) -> int:
    """The order written out: empty, then plain by score and position, then protected by position."""
    ranks = []
    for slot, (score, position) in enumerate(zip(scores, positions, strict=True)):
        if position < 0:
            rank = (0, 0.0, 0)
        elif position < sinks or position >= first_recent:
            rank = (2, 0.0, position)
        else:
            most = torch.finfo(torch.float32).max
            rank = (1, -most if math.isnan(score) else max(-most, min(most, score)), position)
        ranks.append((rank, slot))
    return min(ranks)[1] if ranks else -1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_weakest(impl: str, kind: torch.dtype, poisoned: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for trial in range(60):
        slots = (1, 5, 64, 65)[trial % 4]
        scores = torch.randint(-3, 3, (2, 3, slots), generator=generator).float()
        for special in (torch.nan, torch.inf, -torch.inf):
            scores[torch.rand(scores.shape, generator=generator) < 0.1 * (trial % 3)] = special
        positions = torch.rand(2, 3, slots, generator=generator).argsort(-1).to(kind)
        if trial % 5 == 0:
            positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
        sinks, first_recent = trial % 4, (slots - 3 if trial % 2 else slots * 9)
        if trial % 7 == 0:
            sinks = slots  # everything is protected
        found = weakest(scores, positions, sinks=sinks, first_recent=first_recent, impl=impl)
        for b in range(2):
            for h in range(3):
                wanted = choice(scores[b, h].tolist(), positions[b, h].tolist(), sinks, first_recent)
                assert found[b, h] == wanted, (trial, b, h)
                seen.add(int(wanted))
    assert len(seen) > 10


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weakest_with_limits_per_head_and_lengths(impl: str, poisoned: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 3, 40, generator=generator)
    positions = torch.rand(2, 1, 40, generator=generator).argsort(-1).int()
    sinks = torch.tensor([[[0], [2], [40]], [[3], [1], [0]]])
    recent = torch.tensor([[[30]], [[35]]])
    lengths = torch.tensor([[40, 7, 1], [0, 20, 39]])
    found = weakest(scores, positions, sinks=sinks, first_recent=recent, lengths=lengths, impl=impl)
    for b in range(2):
        for h in range(3):
            n = int(lengths[b, h])
            wanted = choice(
                scores[b, h, :n].tolist(), positions[b, 0, :n].tolist(), int(sinks[b, h]), int(recent[b, 0])
            )
            assert found[b, h] == wanted
    assert found[1, 0] == -1
    strided = weakest(scores[:, :1].expand(2, 3, 40), positions.expand(2, 3, 40), impl=impl)
    assert strided.tolist() == weakest(scores[:, :1], positions, impl="reference").expand(2, 3).tolist()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_is_overwritten(impl: str) -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(2, 3, 9, 16, generator=generator)
    values = torch.randn(2, 3, 9, 8, generator=generator).half()
    positions, score = torch.arange(9).expand(2, 3, 9).contiguous().int(), torch.rand(2, 3, 9, generator=generator)
    columns = [keys, values, positions, score]
    rows = [
        torch.randn(2, 1, 3, 16, generator=generator).transpose(1, 2),
        torch.randn(2, 3, 1, 8).half(),
        torch.tensor([[77]], dtype=torch.int32),
        torch.zeros(2, 1),
    ]
    writer = RowWriter(columns, (2, 3), impl=impl)
    for slots in ([[0, 8, 4], [3, 3, 1]], [[1, 8, 2], [0, 3, 5]]):
        before = [column.clone() for column in columns]
        slot = torch.tensor(slots)
        writer.write(slot[..., None], rows)
        for column, old, row in zip(columns, before, rows, strict=True):
            for b in range(2):
                for h in range(3):
                    for s in range(9):
                        wanted = row[b % len(row), h % row.shape[1]].squeeze(0) if s == slot[b, h] else old[b, h, s]
                        assert torch.equal(column[b, h, s], wanted)
            assert not torch.equal(column, old)
    before = [column.clone() for column in columns]
    writer.write(slot[..., None], [rows[0] + 1])  # only the first column
    assert not torch.equal(keys, before[0])
    assert all(torch.equal(column, old) for column, old in zip(columns[1:], before[1:], strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_of_flat_columns_is_overwritten(impl: str) -> None:
    column, scores = torch.zeros(20, 4), torch.zeros(20)
    starts, slot = torch.tensor([[0, 5], [9, 15]]), torch.tensor([[[4], [0]], [[5], [2]]])
    writer = RowWriter([column, scores], (2, 2), starts, impl=impl)
    writer.write(slot, [torch.ones(2, 2, 1, 4), torch.ones(2, 2)])
    written = [4, 5, 14, 17]
    assert column.sum(1).nonzero().flatten().tolist() == written and scores.nonzero().flatten().tolist() == written
    with pytest.raises(IndexError):
        writer.write(torch.tensor([[[0], [0]], [[0], [9]]]), [torch.ones(2, 2, 1, 4)])
    with pytest.raises(ValueError, match="contiguous"):
        RowWriter([column[:, ::2]], (2, 2), starts)
    with pytest.raises(ValueError, match="impl"):
        RowWriter([column], (2, 2), starts, impl="fast")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compact(impl: str, poisoned: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 50, 3, 24, generator=generator).transpose(1, 2)
    columns: list[Tensor] = [
        keys,
        torch.randn(2, 3, 50, 7, generator=generator).bfloat16(),
        torch.randint(-128, 127, (2, 3, 50, 5), generator=generator).to(torch.int8),
        torch.arange(300).view(2, 3, 50),
        torch.rand(2, 3, 100, generator=generator)[:, :, ::2],
    ]
    for heads in (1, 3):
        index = torch.randint(-1, 50, (2, heads, 31), generator=generator)
        index[:, :, 4:6] = 9
        index[:, :, 0] = -1
        found = compact(columns, index, impl=impl)
        for column, result in zip(columns, found, strict=True):
            assert result.is_contiguous() and result.dtype == column.dtype
            for b in range(2):
                for h in range(3):
                    for place, slot in enumerate(index[b, h % heads].tolist()):
                        wanted = column[b, h, slot] if slot >= 0 else torch.zeros_like(column[b, h, 0])
                        assert torch.equal(result[b, h, place], wanted)
    with pytest.raises(IndexError):
        compact(columns, torch.tensor([[[50]]]), impl=impl)
