"""Budgets: how many tokens a KV head of a layer keeps, given as tokens, as a share of the prompt, or as bytes of the whole cache."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

BudgetValue = int | float | str


def parse_bytes(value: str | int, *, field: str = "bytes") -> int:
    """Bytes of `"256MB"` (10^6), `"2GiB"` (2^30) or a plain integer.

    Raises:
        ValueError: naming `field`, the rule and the value.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        amount, unit = float(value), "B"
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value) if isinstance(value, str) else None
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(f"{field} must be bytes with a unit, like '256MB' or '1.5GiB', got {value!r}")
        amount, unit = float(match[1]), match[2].upper()
    size = int(amount * UNITS[unit])
    if size < 1:
        raise ValueError(f"{field} must be at least one byte, got {value!r}")
    return size


@dataclass(frozen=True)
class Budget:
    """A checked budget. Exactly one of `tokens`, `share`, `size` is set.

    Args:
        tokens: tokens kept per KV head, sinks and window included.
        share: part of the prompt in (0, 1], rounded down, at least one token.
        size: bytes of the whole cache.
    """

    tokens: int | None = None
    share: float | None = None
    size: int | None = None

    @classmethod
    def parse(cls, value: BudgetValue, *, field: str = "budget") -> Budget:
        """Read an int (tokens), a float (share of the prompt) or a string (bytes).

        Raises:
            ValueError: naming `field`, the rule and the value.
        """
        rule = (
            f"{field} must be tokens (an int >= 1), a share of the prompt (a float in (0, 1]) or bytes (like '256MB')"
        )
        if isinstance(value, bool):
            raise ValueError(f"{rule}, got {value!r}")
        if isinstance(value, numbers.Integral):
            if value < 1:
                raise ValueError(f"{rule}, got {value!r}")
            return cls(tokens=int(value))
        if isinstance(value, numbers.Real):
            if not 0 < float(value) <= 1:  # also refuses NaN
                raise ValueError(f"{rule}, got {value!r}")
            return cls(share=float(value))
        if isinstance(value, str):
            return cls(size=parse_bytes(value, field=field))
        raise ValueError(f"{rule}, got {value!r}")

    def resolve(
        self, prompt_tokens: Sequence[int], bytes_per_token: int, *, spare: int = 1, fixed_bytes: int = 0
    ) -> list[int]:
        """Tokens per KV head for each batch row.

        Args:
            prompt_tokens: tokens of the prompt of each batch row, padding excluded.
            bytes_per_token: what one more token per KV head of every layer costs for the whole batch.
            spare: slots held beside the kept tokens: the one that the next token overwrites, or more.
            fixed_bytes: what the cache holds besides, however many tokens it keeps.

        Raises:
            ValueError: a byte budget too small for a single token.
        """
        if self.tokens is not None:
            return [self.tokens] * len(prompt_tokens)
        if self.share is not None:
            return [max(1, math.floor(self.share * tokens + 1e-9)) for tokens in prompt_tokens]
        tokens = ((self.size or 0) - fixed_bytes) // bytes_per_token - spare
        if tokens < 1:
            raise ValueError(
                f"budget of {self.size} bytes is too small: one token and {spare} for those to come take "
                f"{(1 + spare) * bytes_per_token + fixed_bytes} bytes"
            )
        return [tokens] * len(prompt_tokens)
