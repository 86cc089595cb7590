"""Attention mass, interpreted, against fp64; the noise against a Philox written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpress.kernels.attention_mass import reference
from kvpress.kernels.attention_mass.triton import attention_mass

ABSENT = dict.fromkeys(("positions", "query_positions", "starts", "lengths", "softcap", "sinks"))


def make(generator, batch=1, kv_heads=2, group=2, rows=3, slots=65, dim=16, dtype=torch.float32):
    query = torch.randn(batch, kv_heads * group, rows, dim, generator=generator).to(dtype)
    return query, torch.randn(batch, kv_heads, slots, dim, generator=generator).to(dtype)


def compare(within_budget, oracle, query, keys, splits=None, **options):
    arguments = ABSENT | {"scaling": query.shape[-1] ** -0.5} | options
    mass = attention_mass(query, keys, splits=splits, **arguments)
    _, _, weights = oracle(query, keys, keys, **arguments)
    within_budget(mass, weights.sum(2), reference.attention_mass(query, keys, **arguments).to(torch.float32))
    assert mass.dtype == torch.float32 and mass.sum() > 0
    return mass


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("slots", [1, 63, 65])
@pytest.mark.parametrize("rows", [1, 5])
def test_groups_and_lengths(generator, within_budget, oracle, group, slots, rows):
    compare(within_budget, oracle, *make(generator, group=group, slots=slots, rows=rows))


@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("rows", [1, 3])
def test_head_sizes(generator, within_budget, oracle, dim, rows):
    compare(within_budget, oracle, *make(generator, dim=dim, rows=rows), splits=2)


@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("splits", [1, 2])
def test_masks(generator, within_budget, oracle, rows, splits):
    query, keys = make(generator, batch=2, group=4, rows=rows, slots=70)
    positions = torch.stack([torch.randperm(70, generator=generator) for _ in range(4)]).view(2, 2, 70)
    positions[:, :, 5] = -1
    query_positions = torch.arange(70 - rows, 70)[None].repeat(2, 1)
    if rows > 1:
        query_positions[0, :3] = -1  # padding votes for nothing
    mass = compare(within_budget, oracle, query, keys, splits, positions=positions, query_positions=query_positions)
    assert (mass[:, :, 5] == 0).all()
    torch.testing.assert_close(mass[0].sum(-1), torch.full((8,), rows - 3.0 if rows > 1 else 1.0))


@pytest.mark.parametrize("rows", [1, 3])
def test_ragged_with_sinks_and_softcap(generator, within_budget, oracle, rows):
    query, _ = make(generator, batch=2, rows=rows)
    keys = torch.randn(210, 16, generator=generator)
    layout = dict(starts=torch.tensor([[140, 3], [0, 131]]), lengths=torch.tensor([[65, 0], [130, 7]]))
    mass = compare(within_budget, oracle, query, keys, **layout, sinks=torch.zeros(4), softcap=3.0)
    assert mass.shape == (2, 4, 130) and (mass[1, 2:, 7:] == 0).all() and (mass[0, 2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(generator, within_budget, oracle, dtype):
    query, keys = make(generator, rows=5, slots=130, dtype=dtype)
    compare(within_budget, oracle, query.transpose(1, 2).contiguous().transpose(1, 2), keys[:, :, ::2])


def test_from_the_log_sum_exp_of_attention(generator, within_budget, oracle):
    query, keys = make(generator, rows=6)
    options = ABSENT | {"scaling": 0.25}
    _, lse, weights = oracle(query, keys, keys, scaling=0.25)
    mass = attention_mass(query, keys, lse=lse.float(), **options)
    within_budget(mass, weights.sum(2), reference.attention_mass(query, keys, **options))
    with pytest.raises(ValueError, match="lse can be given only without noise"):
        attention_mass(query, keys, lse=lse.float(), temperature=2.0, **options)


LOW = 0xFFFFFFFF


def mixed(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & LOW
    return x ^ (x >> 16)


def noise_of(seed, head, row, key):
    """The noise of one place, in fp64 from the 32-bit word that the specification makes."""
    base = mixed(mixed(seed & LOW) ^ ((seed >> 32) & LOW))
    first = mixed(mixed((base + (head + 1) * 0x9E3779B9) & LOW) ^ ((row * 0xC2B2AE3D) & LOW))
    word = mixed((key * 0x9E3779B9 + first) & LOW) ^ mixed((first + 0x27D4EB2F) & LOW)
    word = (word * 0x9E3779B1) & LOW
    return -np.log(-np.log((((word ^ (word >> 15)) >> 9) + 0.5) / 2**23))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("group", [1, 3])  # other tiles of rows, the same noise
def test_noise_is_a_hash_of_the_place(generator, within_budget, oracle, rows, splits, placed, group):
    """By the positions of row and key where there are some, else by their numbers."""
    seed = 2**40 + 12345
    query, keys = make(generator, group=group, rows=rows, slots=65)
    options = {"scaling": 0.25}
    key_places, row_places = list(range(65)), list(range(rows))
    if placed:
        key_places, row_places = torch.randperm(99, generator=generator)[:65].tolist(), list(range(80, 80 + rows))
        options |= {"positions": torch.tensor([[key_places]]), "query_positions": torch.tensor([row_places])}
    noise = np.empty((1, 2 * group, rows, 65))
    for _, head, row, slot in np.ndindex(noise.shape):
        noise[0, head, row, slot] = noise_of(seed, head, row_places[row], key_places[slot])
    assert 0.2 < noise.mean() < 0.95 and 0.9 < noise.std() < 1.7
    mass = attention_mass(query, keys, noise_seed=seed, temperature=1.5, splits=splits, **(ABSENT | options))
    _, _, weights = oracle(query, keys, keys, noise=torch.tensor(noise), temperature=1.5, **options)
    exact = weights.sum(2)
    within_budget(mass, exact, exact.float() * (1 + 1e-6))  # the log of a log costs a few units in the last place
    plain = attention_mass(query, keys, **(ABSENT | options))
    assert (mass - plain).abs().max() > 1e-3


def test_noise_is_finite_at_both_ends():
    """The least and the greatest number that the generator can make, in fp32 as the kernel computes them."""
    ends = (np.array([0, 2**23 - 1], dtype=np.uint32).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    noise = -np.log(-np.log(ends))
    assert np.isfinite(noise).all() and noise.max() > 15
    greatest = (np.float32(2**24 - 1) + np.float32(0.5)) * np.float32(2**-24)
    assert greatest == 1.0  # why there are not 24 bits
