"""RULER's length rule: prompt tokens, answer prefix and template included, plus the output limit must fit."""

from collections.abc import Callable


def largest_fitting(fits: Callable[[int], bool]) -> int:
    """The largest number of haystack units that fits, by doubling and then halving; 0 if not even one does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def shrink(units: int, increment: int) -> int:
    """The next smaller size to try: one increment less, or half when an increment would leave nothing."""
    return units - increment if units > increment else units // 2
