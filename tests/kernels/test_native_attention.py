"""Native attention against an fp64 oracle: every head size, group, length, layout, storage type and instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpress.kernels.attention import attend, attend_with_weights
from kvpress.kernels.packing import pack_int8
from kvpress.row_format import Int8Rows
from kvpress.testing.slots_oracle import assert_within_budget, error_budget, oracle, rejected


def tensors(
    batch: int = 1, kv_heads: int = 2, group: int = 3, rows: int = 1, slots: int = 65, dim: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, rows, dim, generator=generator)
    keys = torch.randn(batch, kv_heads, slots, dim, generator=generator)
    values = torch.randn(batch, kv_heads, slots, dim, generator=generator)
    return query, keys, values


def check(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> None:
    options.setdefault("scaling", query.shape[-1] ** -0.5)
    exact, exact_lse, _ = oracle(query, keys, values, **options)
    low, low_lse = attend(query, keys, values, impl="reference", **options)
    output, lse = attend(query, keys, values, impl="native", **options)
    assert exact.abs().max() > 0, "vacuous: nothing was attended to"
    assert_within_budget(output, low, exact)
    assert lse is not None and low_lse is not None
    assert_within_budget(lse, low_lse, exact_lse)


def scattered(batch: int, kv_heads: int, slots: int, seed: int = 1) -> Tensor:
    """Positions in no order, one in ten slots empty."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(batch, kv_heads, slots, generator=generator).argsort(-1)
    return positions.masked_fill(torch.rand(positions.shape, generator=generator) < 0.1, -1)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 100])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_head_sizes_and_groups(level: str, dim: int, group: int, poisoned: list[int]) -> None:
    for rows in (1, 5, 33):
        query, keys, values = tensors(group=group, dim=dim, rows=rows, slots=65)
        positions = scattered(1, 2, 65)
        seen = torch.linspace(-1, 64, rows).long()[None] if rows > 1 else torch.tensor([[60]])
        check(query, keys, values, positions=positions, query_positions=seen)
        check(query, keys, values)
    assert poisoned[0] > 0


@pytest.mark.parametrize("slots", [1, 63, 65, 1000, 4097])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_lengths(level: str, slots: int, rows: int, poisoned: list[int]) -> None:
    query, keys, values = tensors(rows=rows, slots=slots, group=4)
    check(query, keys, values)
    if rows <= slots:
        options: dict[str, Any] = {"scaling": 0.125}
        slot = torch.arange(slots)
        low, _ = attend(query, keys, values, impl="reference", causal=True, **options)
        options |= {"positions": slot[None, None], "query_positions": slot[None, slots - rows :]}
        exact, _, _ = oracle(query, keys, values, **options)
        found, _ = attend(query, keys, values, impl="native", causal=True, scaling=0.125)
        assert_within_budget(found, low, exact)


@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("query_kind", [torch.float32, torch.bfloat16, torch.float16])
def test_storage(level: str, rows: int, kind: torch.dtype, query_kind: torch.dtype, poisoned: list[int]) -> None:
    query, keys, values = tensors(rows=rows, slots=130, dim=72)
    query = query.to(query_kind)
    options: dict[str, Any] = {"positions": scattered(1, 2, 130), "query_positions": torch.full((1, rows), 100)}
    if kind == torch.int8:
        scales = [slots.abs().amax(-1) / 127 for slots in (keys, values)]
        keys, values = (
            (slots / scale[..., None]).round().to(torch.int8)
            for slots, scale in zip((keys, values), scales, strict=True)
        )
        options |= {"keys_scale": scales[0], "values_scale": scales[1]}
    else:
        keys, values = keys.to(kind), values.to(kind)
    check(query, keys, values, **options)


@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("group", [1, 4, 6])
def test_packed_int8_rows(level: str, rows: int, group: int, poisoned: list[int]) -> None:
    """Scales that lie behind their rows, as a cache stores them: all slots, listed ones, and ragged heads."""
    query, keys, values = tensors(batch=2, rows=rows, group=group, slots=150, dim=68)
    (keys, keys_scale), (values, values_scale) = (Int8Rows().parts(pack_int8(slots)) for slots in (keys, values))
    assert keys.stride(-2) == 4 * keys_scale.stride(-1) == 72
    index = torch.randint(-1, 150, (2, 2, 90), generator=torch.Generator().manual_seed(3))
    for options in (
        {},
        {"index": index},
        {"positions": scattered(2, 2, 150), "query_positions": torch.arange(60, 60 + rows)[None]},
    ):
        check(query, keys, values, keys_scale=keys_scale, values_scale=values_scale, **options)
    ragged: dict[str, Any] = {"starts": torch.tensor([[3, 75], [80, 0]]), "lengths": torch.tensor([[70, 1], [0, 149]])}
    ragged |= {"keys_scale": keys_scale[0, 0], "values_scale": values_scale[0, 0]}
    check(query, keys[0, 0], values[0, 0], **ragged)
    output, _ = attend(query, keys, values, scaling=1.0, keys_scale=keys_scale, values_scale=values_scale.flip(-1))
    exact = oracle(query, keys, values, scaling=1.0, keys_scale=keys_scale, values_scale=values_scale)[0]
    assert rejected(assert_within_budget, output, exact.float(), exact)


@pytest.mark.parametrize("group", [1, 3, 4, 6])
def test_every_slot_has_its_own_factor(level: str, group: int) -> None:
    """Factors of any sign and size, every count of slots in a tile, side by side or apart in memory with NaN between; slots in order, some
    of them empty, and listed."""
    for slots in [*range(1, 10), *range(58, 70)]:
        generator = torch.Generator().manual_seed(slots)
        query = torch.randn(1, 2 * group, 1, 16, generator=generator)
        keys, values = torch.randint(-127, 128, (2, 1, 2, slots, 16), generator=generator, dtype=torch.int8)
        size = torch.tensor([0.01, 0.001])[torch.arange(slots) % 2]
        factors = torch.randn(2, 1, 2, slots, generator=generator) * size
        apart = torch.full((2, 1, 2, slots, 3), torch.nan)
        apart[..., 1] = factors
        backwards = torch.arange(slots - 1, -1, -1)[None, None]
        gaps = torch.arange(slots)[None, None].masked_fill(torch.arange(slots) % 3 == 1, -1)
        for keys_scale, values_scale in (factors, apart[..., 1]):
            for options in ({}, {"index": backwards}, {"positions": gaps}):
                check(query, keys, values, keys_scale=keys_scale, values_scale=values_scale, **options)
    exact = oracle(query, keys, values, scaling=1.0, keys_scale=factors[0], values_scale=factors[1])[0]
    for wrong in (factors.roll(1, -1), factors.flip(2)):  # those of the slot before, and of the other head
        output, _ = attend(query, keys, values, scaling=1.0, keys_scale=wrong[0], values_scale=wrong[1], impl="native")
        assert rejected(assert_within_budget, output, exact.float(), exact)


def test_every_fp16_and_bf16_number_is_read(level: str) -> None:
    """A value row of any finite bits comes out as it is: one slot has all the weight."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for kind in (torch.float16, torch.bfloat16):
        numbers = bits.view(kind)
        numbers = numbers[torch.isfinite(numbers)]
        values = numbers[: len(numbers) // 64 * 64].view(1, -1, 1, 64)
        query = torch.zeros(1, values.shape[1], 1, 64)
        output, _ = attend(query, values.clone(), values, scaling=1.0, impl="native")
        assert torch.equal(output, values.float())
        narrow, _ = attend(query.to(kind), values.clone(), values, scaling=1.0, impl="native")
        assert torch.equal(narrow, values)


@pytest.mark.parametrize("rows", [1, 17])
def test_flat_ragged_heads(level: str, rows: int, poisoned: list[int]) -> None:
    lengths = torch.tensor([[70, 1], [0, 129]])
    starts = torch.tensor([[3, 75], [80, 90]])
    query, keys, values = tensors(batch=2, rows=rows, slots=230)
    keys, values = keys[0, 0], values[0, 0]
    check(query, keys, values, starts=starts, lengths=lengths)
    positions = scattered(2, 2, 129)
    seen = torch.arange(rows)[None] * 5 + 20
    check(query, keys, values, starts=starts, lengths=lengths, positions=positions, query_positions=seen)
    padding = torch.stack([torch.arange(rows), torch.arange(rows) - 1])
    check(query, keys, values, starts=starts, lengths=lengths, query_positions=padding)


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("per_head", [False, True])
def test_index_with_duplicates_and_gaps(level: str, rows: int, per_head: bool, poisoned: list[int]) -> None:
    query, keys, values = tensors(batch=2, rows=rows, slots=300)
    index = torch.randint(-1, 300, (2, 2 if per_head else 1, 90), generator=torch.Generator().manual_seed(3))
    index[:, :, 5:9] = 7
    assert (index == -1).any() or index.masked_fill_(index % 11 == 0, -1).eq(-1).any()
    check(query, keys, values, index=index)
    positions = scattered(2, 2, 300)
    seen = torch.arange(rows)[None] * 10 + 30
    check(query, keys, values, index=index, positions=positions, query_positions=seen)
    check(query, keys, values, index=index.to(torch.int32), positions=positions.to(torch.int32), query_positions=seen)


@pytest.mark.parametrize("rows", [1, 17])
def test_nothing_visible_gives_zero(level: str, rows: int, poisoned: list[int]) -> None:
    query, keys, values = tensors(rows=rows)
    for options in (
        {"index": torch.empty(1, 1, 0, dtype=torch.int64)},
        {"index": torch.full((1, 2, 9), -1)},
        {"positions": torch.full((1, 1, 65), -1)},
        {"positions": torch.arange(65)[None, None], "query_positions": torch.full((1, rows), -1)},
    ):
        output, lse = attend(query, keys, values, scaling=1.0, impl="native", **options)
        assert torch.equal(output, torch.zeros_like(query)) and lse is not None
        assert torch.equal(lse, torch.full(lse.shape, -torch.inf))
        sinks = torch.randn(6, generator=torch.Generator().manual_seed(0))
        output, lse = attend(query, keys, values, scaling=1.0, sinks=sinks, impl="native", **options)
        assert torch.equal(output, torch.zeros_like(query)) and lse is not None
        torch.testing.assert_close(lse, sinks[None, :, None].expand_as(lse))


@pytest.mark.parametrize("rows", [1, 17])
def test_softcap_and_sinks(level: str, rows: int, poisoned: list[int]) -> None:
    query, keys, values = tensors(rows=rows, slots=200)
    sinks = torch.linspace(-3, 6, 6)
    check(query * 4, keys, values, softcap=5.0)
    check(query, keys, values, softcap=50.0)
    check(query, keys, values, sinks=sinks)
    check(query, keys, values, sinks=sinks, softcap=30.0, positions=scattered(1, 2, 200))


@pytest.mark.parametrize("rows", [1, 17])
def test_strides(level: str, rows: int, poisoned: list[int]) -> None:
    """Views with gaps, swapped dimensions and a stride of 0; rows of different last sizes."""
    query, keys, values = tensors(batch=2, rows=rows, slots=90, dim=64)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    keys = torch.stack([keys, torch.full_like(keys, torch.nan)], dim=3)[:, :, :, 0]
    values = values.transpose(1, 2).contiguous().transpose(1, 2)[..., 8:56]
    assert not (query.is_contiguous() or keys.is_contiguous() or values.is_contiguous()) or rows == 1
    check(query, keys, values, positions=scattered(2, 2, 180)[:, :, ::2].clamp(max=89))
    check(query, keys[:1].expand(2, -1, -1, -1), values)


def test_large_scores_do_not_overflow(level: str) -> None:
    query, keys, values = tensors(slots=100)
    check(query * 300, keys, values)
    query, keys, values = tensors(slots=100, rows=20)
    check(query * 300, keys, values)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("slots", [700, 4097])
def test_threads_and_splits(threads: int, slots: int, poisoned: list[int]) -> None:
    torch.set_num_threads(threads)
    query, keys, values = tensors(batch=2, kv_heads=3, slots=slots, dim=64)
    check(query, keys, values, positions=scattered(2, 3, slots))
    query, keys, values = tensors(batch=2, kv_heads=3, slots=300, rows=70)
    check(query, keys, values, positions=scattered(2, 3, 300), query_positions=torch.arange(230, 300)[None])


@pytest.mark.parametrize("group", [1, 3, 4, 6, 16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_weights(level: str, group: int, reduction: str, poisoned: list[int]) -> None:
    cases: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = []
    dense = tensors(batch=2, group=group, slots=77)
    cases.append((dense, {"positions": scattered(2, 2, 77), "query_positions": torch.tensor([[50], [-1]])}))
    index = torch.randint(-1, 77, (2, 2, 40), generator=torch.Generator().manual_seed(3))
    cases.append((dense, {"index": index, "sinks": torch.randn(2 * group), "softcap": 9.0}))
    query, keys, values = tensors(batch=2, group=group, slots=300)
    ragged = {"starts": torch.tensor([[0, 70], [80, 150]]), "lengths": torch.tensor([[70, 9], [33, 1]])}
    cases.append(((query, keys[0, 0], values[0, 0]), ragged))
    for (query, keys, values), options in cases:
        options["scaling"] = 0.2
        exact, exact_lse, weights = oracle(query, keys, values, **options)
        shares = weights[:, :, 0].unflatten(1, (2, group))
        wanted = shares.amax(2) if reduction == "max" else shares.sum(2) / (group if reduction == "mean" else 1)
        low = attend_with_weights(query, keys, values, reduction=reduction, impl="reference", **options)
        found = attend_with_weights(query, keys, values, reduction=reduction, impl="native", **options)
        assert wanted.max() > 0
        for result, rough, fine in zip(found, low, (exact, exact_lse, wanted), strict=True):
            assert_within_budget(result, rough, fine)


def test_sabotage_is_seen() -> None:
    """Wrong results of every kind the kernels could make are outside the budget: the checks above can fail."""
    query, keys, values = tensors(slots=1000, rows=2, group=4)
    positions, seen = torch.arange(1000)[None, None], torch.tensor([[998, 999]])
    options: dict[str, Any] = {"scaling": 0.125, "positions": positions, "query_positions": seen}
    exact, exact_lse, _ = oracle(query, keys, values, **options)
    low, low_lse = attend(query, keys, values, impl="reference", **options)

    def other(**changes: Any) -> Tensor:
        found, _ = attend(query, keys, values, impl="native", **(options | changes))
        return found

    assert not rejected(assert_within_budget, other(), low, exact)
    assert rejected(assert_within_budget, other(query_positions=seen + 1), low, exact)  # one slot too many
    assert rejected(assert_within_budget, other(query_positions=seen - 1), low, exact)  # one too few
    assert rejected(assert_within_budget, other(scaling=0.1251), low, exact)
    assert rejected(assert_within_budget, other(softcap=50.0), low, exact)
    assert rejected(assert_within_budget, other().roll(1, dims=1), low, exact)  # heads mixed up
    assert rejected(assert_within_budget, low_lse + 1e-4, low_lse, exact_lse)
    assert error_budget(low, exact, torch.float32) < 1e-5


def test_large_strides() -> None:
    """Slots more than 2^31 elements apart, in memory that is only reserved."""
    mmap = pytest.importorskip("mmap")
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    apart, dim, slots = 2**31 + 64, 64, 5
    try:
        memory = mmap.mmap(-1, 4 * (apart + slots * dim) * 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    except OSError as error:
        pytest.skip(f"no address space to reserve: {error}")
    flat = torch.frombuffer(memory, dtype=torch.float32)
    query, keys, values = tensors(kv_heads=2, slots=slots, dim=dim)
    far = flat.as_strided((1, 2, slots, dim), (0, apart, dim, 1))
    far.copy_(keys)
    assert far.stride(1) > 2**31
    check(query, far, values, positions=torch.arange(slots)[None, None], query_positions=torch.tensor([[3]]))
    rows = flat.as_strided((3, dim), (apart // 2, 1))
    rows.copy_(keys[0, 0, :3])
    assert 2 * rows.stride(0) > 2**31
    check(query, rows, rows, starts=torch.tensor([[0, 1]]), lengths=torch.tensor([[3, 2]]))
