"""Gumbel noise that depends on what it is for alone: seed, query head, and the positions of row and key
(specification).

A counter-based generator: any tile of any implementation makes the same numbers in any order. 32-bit arithmetic,
wrapping; `mix` is the finalizer of MurmurHash3 (Appleby, public domain), `n32` the low 32 bits of `n`:

    base   = mix(mix(seed32) ^ (seed >> 32)32)
    head   = mix(base + (query_head + 1) * 0x9e3779b9)
    first  = mix(head ^ (row_position32 * 0xc2b2ae3d));    second = mix(first + 0x27d4eb2f)
    word   = (mix(key_position32 * 0x9e3779b9 + first) ^ second) * 0x9e3779b1;    word ^= word >> 15
    u      = ((word >> 9) + 0.5) / 2^23;    noise = -log(-log(u))

The batch row is not among them: a prompt gets the same noise alone and in a batch. Noise lies between -2.9 and 17.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 over int64 numbers below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & LOW
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & LOW
    return x ^ (x >> 16)


def seed_from_head(seed: int, first: int) -> int:
    """The seed with which query head `h` gets the noise that head `first + h` gets with `seed`; a 64-bit integer with a sign.

    For a process that holds the heads from `first` on. `head` above is a hash of a sum: `base` moves on by `first` terms, and the upper
    half of the seed is what gives that base.
    """
    if first == 0:
        return seed
    low = seed & LOW
    lower = int(mix(torch.tensor(low)))
    base = (int(mix(torch.tensor(lower ^ ((seed >> 32) & LOW)))) + first * 0x9E3779B9) & LOW
    moved = ((_unmixed(base) ^ lower) << 32) | low
    return moved - (1 << 64) if moved >> 63 else moved


def _unmixed(x: int) -> int:
    """The number of which `mix` makes `x`."""
    x ^= x >> 16
    x = (x * pow(0xC2B2AE35, -1, 1 << 32)) & LOW
    x ^= (x >> 13) ^ (x >> 26)
    x = (x * pow(0x85EBCA6B, -1, 1 << 32)) & LOW
    return x ^ (x >> 16)


def exponential(seed: int, query_heads: Tensor, row_positions: Tensor, key_positions: Tensor) -> Tensor:
    """`-log(u)` in fp32: standard exponential variates, of which Gumbel noise is `-log`.

    Args:
        seed: 64-bit integer.
        query_heads, row_positions, key_positions: integers that broadcast together.
    """
    base = mix(mix(torch.tensor(seed & LOW)) ^ ((seed >> 32) & LOW)).to(query_heads.device)
    head = mix((base + (query_heads.long() + 1) * 0x9E3779B9) & LOW)
    first = mix(head ^ ((row_positions.long() * 0xC2B2AE3D) & LOW))
    second = mix((first + 0x27D4EB2F) & LOW)
    word = mix((key_positions.long() * 0x9E3779B9 + first) & LOW)
    word = ((word ^ second) * 0x9E3779B1) & LOW
    word = word ^ (word >> 15)
    return -torch.log(((word >> 9).float() + 0.5) * (1.0 / 8388608.0))


def gumbel(seed: int, query_heads: Tensor, row_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Standard Gumbel noise; see `exponential`."""
    return -torch.log(exponential(seed, query_heads, row_positions, key_positions))
