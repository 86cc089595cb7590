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
HeadBudgets = tuple[int | float, ...]
Budgets = BudgetValue | tuple[int | float | HeadBudgets, ...]


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
        self, prompt_tokens: Sequence[int], bytes_per_token: int, fixed_bytes: int = 0, *, spare: int = 1
    ) -> list[int]:
        """Tokens per KV head for each batch row.

        Args:
            prompt_tokens: tokens of the prompt of each batch row, padding excluded.
            bytes_per_token: what one more token per KV head of every layer costs for the whole batch.
            fixed_bytes: what the cache holds besides, however many tokens it keeps.
            spare: slots held beside the kept tokens: the one that the next token overwrites, or more.

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


def frozen_budgets(value: object, *, field: str = "budget") -> Budgets:
    """`value` with lists made tuples, checked: one budget, or an entry a layer, which may be a tuple with an entry a KV head.

    Raises:
        ValueError: naming `field`, the rule and the value.
    """
    if not isinstance(value, list | tuple):
        Budget.parse(value, field=field)  # type: ignore[arg-type]
        return value  # type: ignore[return-value]
    if not value:
        raise ValueError(f"{field} must have an entry for each compressed layer, got {value!r}")
    layers: list[int | float | HeadBudgets] = []
    for entry in value:
        heads = entry if isinstance(entry, list | tuple) else (entry,)
        if not heads or any(isinstance(head, str) or Budget.parse(head, field=field).size for head in heads):
            raise ValueError(
                f"entries of {field} must be tokens or shares, bytes are of the whole cache, got {entry!r}"
            )
        layers.append(tuple(heads) if isinstance(entry, list | tuple) else entry)
    return tuple(layers)


def token_budgets(value: Budgets) -> list[int]:
    """The budgets in `value` that are given in tokens."""
    entries = [value] if not isinstance(value, tuple) else value
    heads = [head for entry in entries for head in (entry if isinstance(entry, tuple) else (entry,))]
    found = [Budget.parse(head).tokens for head in heads]
    return [tokens for tokens in found if tokens is not None]


def layer_budgets(value: Budgets, ordinal: int, layers: int) -> list[Budget]:
    """The budget of the `ordinal`-th of `layers` compressed layers: one, or one a KV head.

    Raises:
        ValueError: another number of entries than layers.
    """
    if not isinstance(value, tuple):
        return [Budget.parse(value)]
    if len(value) != layers:
        raise ValueError(f"budget must have an entry for each of {layers} compressed layers, got {len(value)}")
    entry = value[ordinal]
    return [Budget.parse(head) for head in (entry if isinstance(entry, tuple) else (entry,))]
