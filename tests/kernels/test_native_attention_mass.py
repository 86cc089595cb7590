"""Native attention mass against an fp64 oracle: windows, whole prompts, noise, temperature, given log-sum-exp, row
weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpress.kernels.attention import attend
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.attention_mass.noise import gumbel
from kvpress.testing.slots_oracle import assert_within_budget, oracle, rejected


def tensors(
    batch: int = 1, kv_heads: int = 2, group: int = 3, rows: int = 9, slots: int = 65, dim: int = 64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, kv_heads * group, rows, dim, generator=generator)
    return query, torch.randn(batch, kv_heads, slots, dim, generator=generator)


def scattered(batch: int, kv_heads: int, slots: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    positions = torch.rand(batch, kv_heads, slots, generator=generator).argsort(-1)
    return positions.masked_fill(torch.rand(positions.shape, generator=generator) < 0.1, -1).int()


def check(query: Tensor, keys: Tensor, **options: Any) -> None:
    """The mass is the sum over rows of the oracle's weights."""
    options.setdefault("scaling", 0.125)
    exact = oracle(query, keys, keys, **options)[2].sum(dim=2)
    low = attention_mass(query, keys, impl="reference", **options)
    found = attention_mass(query, keys, impl="native", **options)
    assert exact.max() > 0
    assert_within_budget(found, low, exact)


def noisy_oracle(query: Tensor, keys: Tensor, positions: Tensor, seen: Tensor, seed: int, temperature: float) -> Tensor:
    """Column sums of softmax((s + noise) / temperature) for one batch row, fp64, from the published formula."""
    heads, rows = query.shape[1:3]
    group = heads // keys.shape[1]
    mass = torch.zeros(1, heads, keys.shape[2], dtype=torch.float64)
    for head in range(heads):
        position = positions[0, (head // group) % positions.shape[1]]
        for row in range(rows):
            scores = (keys[0, head // group].double() @ query[0, head, row].double()) * 0.125
            scores = scores + gumbel(seed, torch.tensor(head), seen[0, row], position).double()
            visible = (position >= 0) & (position <= seen[0, row])
            if visible.any():
                mass[0, head, visible] += torch.softmax(scores[visible] / temperature, dim=0)
    return mass


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_head_sizes_and_groups(level: str, dim: int, group: int, poisoned: list[int]) -> None:
    query, keys = tensors(batch=2, group=group, dim=dim, rows=33)
    seen = torch.stack([torch.arange(33) * 2, torch.arange(33) - 1])
    check(query, keys, positions=scattered(2, 2, 65), query_positions=seen)
    assert poisoned[0] > 0


@pytest.mark.parametrize(("slots", "rows"), [(1, 1), (63, 63), (65, 40), (1000, 32), (4097, 5)])
def test_lengths(level: str, slots: int, rows: int, poisoned: list[int]) -> None:
    query, keys = tensors(slots=slots, rows=rows)
    slot = torch.arange(slots)
    check(query, keys, positions=slot[None, None], query_positions=slot[None, slots - rows :])
    check(query, keys)


def test_storage_and_layouts(level: str, poisoned: list[int]) -> None:
    query, keys = tensors(slots=200, rows=20)
    for kind in (torch.bfloat16, torch.float16):
        check(query.to(kind), keys.to(kind))
    ragged = {"starts": torch.tensor([[3, 75]]), "lengths": torch.tensor([[70, 120]])}
    check(query, keys[0, 0], **ragged)
    check(query, keys[0, 0], positions=scattered(1, 2, 120), query_positions=torch.arange(20)[None] * 6, **ragged)
    scale = keys.abs().amax(-1) / 127
    stored = (keys / scale[..., None]).round().to(torch.int8)
    options: dict[str, Any] = {"scaling": 0.125, "keys_scale": scale}
    exact = oracle(query, stored, keys, **options)[2].sum(dim=2)
    low = attention_mass(query, stored, impl="reference", **options)
    assert_within_budget(attention_mass(query, stored, impl="native", **options), low, exact)


def test_softcap_sinks_and_padding(level: str, poisoned: list[int]) -> None:
    query, keys = tensors(slots=100, rows=30)
    check(query, keys, softcap=3.0, sinks=torch.linspace(-2, 5, 6))
    check(query, keys, positions=scattered(1, 2, 100), query_positions=torch.arange(-10, 20)[None])
    nothing = attention_mass(query, keys, scaling=1.0, positions=torch.full((1, 1, 100), -1), impl="native")
    assert torch.equal(nothing, torch.zeros(1, 6, 100))


def test_given_lse_and_row_weights(level: str, poisoned: list[int]) -> None:
    query, keys = tensors(slots=150, rows=40, batch=2)
    seen = torch.arange(110, 150)[None]
    options: dict[str, Any] = {"scaling": 0.125, "positions": scattered(2, 2, 150), "query_positions": seen}
    options["sinks"] = torch.linspace(-1, 1, 6)
    weights = oracle(query, keys, keys, **options)[2]
    _, lse = attend(query, keys, keys, impl="native", **options)
    low = attention_mass(query, keys, impl="reference", **options)
    assert_within_budget(attention_mass(query, keys, lse=lse, impl="native", **options), low, weights.sum(dim=2))
    assert_within_budget(attention_mass(query, keys, lse=lse, impl="reference", **options), low, weights.sum(dim=2))
    factors = torch.rand(2, 40, generator=torch.Generator().manual_seed(2))
    exact = (weights * factors[:, None, :, None].double()).sum(dim=2)
    low = attention_mass(query, keys, row_weights=factors, impl="reference", **options)
    found = attention_mass(query, keys, row_weights=factors, impl="native", **options)
    assert_within_budget(found, low, exact)
    plain = attention_mass(query, keys, impl="native", **options)
    assert rejected(assert_within_budget, plain, low, exact)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", [0, -5, 1 << 40])
def test_noise(level: str, temperature: float, seed: int, poisoned: list[int]) -> None:
    query, keys = tensors(slots=90, rows=25)
    positions, seen = scattered(1, 2, 90), torch.arange(25)[None] * 3 + 5
    options: dict[str, Any] = {"scaling": 0.125, "positions": positions, "query_positions": seen}
    options |= {"noise_seed": seed, "temperature": temperature}
    exact = noisy_oracle(query, keys, positions, seen, seed, temperature)
    low = attention_mass(query, keys, impl="reference", **options)
    found = attention_mass(query, keys, impl="native", **options)
    assert_within_budget(found, low, exact)
    other = attention_mass(query, keys, impl="native", **(options | {"noise_seed": seed + 1}))
    assert rejected(assert_within_budget, other, low, exact)


@pytest.mark.parametrize("noise_seed", [None, 3])
def test_threads_do_not_change_a_bit(noise_seed: int | None) -> None:
    query, keys = tensors(kv_heads=3, slots=700, rows=300)
    slot = torch.arange(700)
    options: dict[str, Any] = {"positions": slot[None, None], "query_positions": slot[None, 400:]}
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mass = attention_mass(query, keys, scaling=0.125, noise_seed=noise_seed, impl="native", **options)
        found.append(mass)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0].sum().item() == pytest.approx(9 * 300, rel=1e-5)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_noise_goes_by_position_not_by_place(impl: str) -> None:
    """Rows one by one give the sum over rows; slots in another order give the same mass in that order."""
    query, keys = tensors(slots=80, rows=20)
    slot = torch.arange(80)
    options: dict[str, Any] = {"scaling": 0.125, "noise_seed": 11, "impl": impl}
    whole = attention_mass(query, keys, positions=slot[None, None], query_positions=slot[None, 60:], **options)
    single = sum(
        attention_mass(
            query[:, :, r : r + 1],
            keys,
            positions=slot[None, None],
            query_positions=slot[None, 60 + r : 61 + r],
            **options,
        )
        for r in range(20)
    )
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-6)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    mixed = attention_mass(
        query, keys[:, :, order], positions=order[None, None], query_positions=slot[None, 60:], **options
    )
    torch.testing.assert_close(mixed, whole[:, :, order], rtol=1e-5, atol=1e-6)


def test_noise_is_standard_gumbel() -> None:
    """Mean 0.5772, standard deviation 1.2825, and no correlation between rows, heads or neighbours."""
    heads, rows, keys = torch.arange(4)[:, None, None], torch.arange(250)[None, :, None], torch.arange(400)[None, None]
    noise = gumbel(9, heads, rows, keys).double()
    count = noise.numel()
    assert abs(noise.mean() - 0.5772157) < 5 * 1.2825 / count**0.5
    assert abs(noise.std() - 1.2825498) < 0.01
    centred = (noise - noise.mean()) / noise.std()
    for product in (
        centred[:, :, 1:] * centred[:, :, :-1],
        centred[:, 1:] * centred[:, :-1],
        centred[1:] * centred[:-1],
        centred[:, 1:, 1:] * centred[:, :-1, :-1],
    ):
        assert abs(product.mean()) < 5 / product.numel() ** 0.5
    levels = torch.exp(-torch.exp(-noise)).flatten()
    counts = torch.histc(levels.float(), bins=64, min=0, max=1)
    chi_square = ((counts - count / 64) ** 2 / (count / 64)).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
