"""Pieces of Triton kernels that find the highest scores of a row in one program, by bisection of the bits of the least that is taken.

A row of up to `MOST` scores is read once and stays in registers. A sort of it takes a dozen launches, which cost the host more than this
costs the GPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from typing import Any

import triton
import triton.language as tl

from kvpress.kernels.triton_support import power_of_two

MOST = 32768  # scores that a program holds
LEAST = 1024
TILE = 4096  # scores that are listed at once
WARPS = 16


def best_arguments(slots: int) -> dict[str, Any]:
    """The constants of a kernel that finds the best of `slots` scores."""
    block = min(max(power_of_two(slots), LEAST), MOST)
    return {"BLOCK": block, "ONCE": slots <= MOST, "TILE": min(TILE, block)}


@triton.jit
def ordered(score):
    """Scores as unsigned numbers above 0 of the same order: both zeros are one, and NaN is zero."""
    plain = tl.where((score == 0) | (score != score), 0.0, score)
    bits = plain.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def numbers(scores, at, slots):
    """The scores `at`, `ordered`; 0 past the last."""
    return tl.where(at < slots, ordered(tl.load(scores + at, mask=at < slots, other=0.0)), 0)


@triton.jit
def reaching(scores, slots, trial, held, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    """How many scores reach `trial`; with `ONCE` they are `held`."""
    if ONCE:
        count = tl.sum((held >= trial).to(tl.int32))
    else:
        count = 0
        for first in range(0, slots, BLOCK):
            count += tl.sum((numbers(scores, first + tl.arange(0, BLOCK), slots) >= trial).to(tl.int32))
    return count


@triton.jit
def least_taken(scores, slots, count, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    """Of the `count` highest of `slots` scores, the later of equal ones first: the least, `ordered`, and how many of its equals, the first
    ones, are not among them."""
    held = numbers(scores, tl.arange(0, BLOCK), slots)
    least, bit = tl.zeros([], tl.uint32), tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        trial = least | bit
        least = tl.where(reaching(scores, slots, trial, held, BLOCK, ONCE) >= count, trial, least)
        bit = bit >> 1
    return least, reaching(scores, slots, least, held, BLOCK, ONCE) - count


@triton.jit
def taken(scores, at, slots, least, skipped, equals_before):
    """Which of the scores `at` are taken, and the equals of the least there are up to the last of them."""
    number = numbers(scores, at, slots)
    equal = number == least
    rank = equals_before + tl.cumsum(equal.to(tl.int32), axis=0)
    return (number > least) | (equal & (rank > skipped)), equals_before + tl.sum(equal.to(tl.int32))
