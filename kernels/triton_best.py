"""Pieces of Triton kernels that find the highest scores of a row in one program: a radix select, eight bits at a time.

Five passes over the row, in launches of their own no more than one: a sort of the row takes a dozen, which cost the host more than the
passes cost the GPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import triton
import triton.language as tl

BINS = tl.constexpr(256)
BLOCK = 4096  # scores looked at at once,
WARPS = 16  # by so many warps


@triton.jit
def ordered(score):
    """Scores as unsigned numbers of the same order: both zeros are one, and NaN is zero."""
    plain = tl.where((score == 0) | (score != score), 0.0, score)
    bits = plain.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def least_taken(scores, slots, count, BLOCK: tl.constexpr):
    """Of the `count` highest of `slots` scores, the later of equal ones first: the least, as `ordered` gives it, and how many of its
    equals, the first ones, are not among them."""
    bins = tl.arange(0, BINS)
    known = tl.zeros([], tl.uint32)
    wanted = count
    equals = count
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([BINS], tl.int32)
        for first in range(0, slots, BLOCK):
            at = first + tl.arange(0, BLOCK)
            number = ordered(tl.load(scores + at, mask=at < slots, other=0.0))
            counted = at < slots
            if digit > 0:
                counted = counted & ((number >> (shift + 8)) == known)
            place = tl.where(counted, (number >> shift) & 255, 0).to(tl.int32)
            # others are counted as zeros, and taken off
            histogram += tl.histogram(place, BINS) - tl.where(bins == 0, tl.sum((~counted).to(tl.int32)), 0)
        from_here_up = tl.cumsum(histogram, axis=0, reverse=True)
        found = tl.sum((from_here_up >= wanted).to(tl.int32)) - 1  # the highest bin that reaches down to what is wanted
        equals = tl.sum(tl.where(bins == found, histogram, 0))
        wanted -= tl.sum(tl.where(bins == found, from_here_up, 0)) - equals
        known = (known << 8) | found.to(tl.uint32)
    return known, equals - wanted


@triton.jit
def taken(scores, at, slots, least, skipped, equals_before):
    """Which of the scores `at` are taken, and the equals of the least there are up to the last of them."""
    number = ordered(tl.load(scores + at, mask=at < slots, other=0.0))
    equal = (at < slots) & (number == least)
    above = (at < slots) & (number > least)
    rank = equals_before + tl.cumsum(equal.to(tl.int32), axis=0)
    return above | (equal & (rank > skipped)), equals_before + tl.sum(equal.to(tl.int32))
