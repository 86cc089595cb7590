"""Numbers as people write and read them: `16k` tokens, bytes with a unit."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "k": 2**10, "m": 2**20}
_STEPS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def parse_tokens(text: str, field: str) -> int:
    """A number of tokens: `4096`, `16k` (16 x 1,024), `1m` (1,024 x 1,024).

    Raises:
        ValueError: not such a number, or below 1; names `field`.
    """
    match = re.fullmatch(r"\s*(\d+)([kKmM]?)\s*", text)
    tokens = int(match[1]) * _FACTORS[match[2].lower()] if match else 0
    if tokens < 1:
        raise ValueError(f"{field} must be a number of tokens such as 4096 or 16k (16 x 1,024), got {text!r}")
    return tokens


def parse_list(text: str, field: str) -> list[int]:
    """`1k,4k,16k` as numbers, ascending, each once.

    Raises:
        ValueError: an item that is no number of tokens; names `field`.
    """
    return sorted({parse_tokens(item, field) for item in text.split(",")})


def written_bytes(count: float) -> str:
    """`1.23 GB`: three figures, units of 1,000."""
    for size, unit in _STEPS:
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
