"""Full: every token is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpress.policies.base import EvictionPolicy
from kvpress.policies.budget import Budgets


@dataclass(frozen=True)
class Full(EvictionPolicy):
    """Keeps every token: the yardstick, and a faster stand-in for `DynamicCache` (no copy of the cache at every token)."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every token"
    paper: ClassVar[str] = "none: the full cache"
    fails: ClassVar[str] = "memory and the time of a decoded token grow with the context"
    same_for_all_heads: ClassVar[bool] = True
    same_in_all_layers: ClassVar[bool] = True

    budget: Budgets | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            raise ValueError(f"budget of full must be None (it keeps every token), got {self.budget!r}")
        if self.interval != 1:
            raise ValueError(f"interval of full must be 1 (it never evicts), got {self.interval!r}")
