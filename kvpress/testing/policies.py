"""Policies made for tests: budgets that differ by layer, by KV head and by batch row, and scores with NaN and ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvpress.policies.base import EvictionPolicy

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class LayerBudgets(EvictionPolicy):
    """Keeps the last tokens and every third one; layer `i` among the compressed ones keeps `budget + i`."""

    name: ClassVar[str] = "layer_budgets"
    summary: ClassVar[str] = "a test: budgets by layer"
    paper: ClassVar[str] = "none"

    def score(self, observation: Observation) -> Tensor:
        positions = observation.positions
        return torch.where(positions % 3 == 0, positions + 100.0, positions.float())

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> Sequence[int] | Sequence[Sequence[int]]:
        return [budget + observation.ordinal for budget in budgets]


@dataclass(frozen=True)
class HeadBudgets(LayerBudgets):
    """As `LayerBudgets`, with one token more per head and per batch row, so that all heads of a layer are unequal."""

    name: ClassVar[str] = "head_budgets"
    summary: ClassVar[str] = "a test: budgets by head and row"

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> Sequence[int] | Sequence[Sequence[int]]:
        heads = observation.positions.shape[1]
        return [[budget + observation.ordinal + head for head in range(heads)] for budget in budgets]


@dataclass(frozen=True)
class VotesByHead(HeadBudgets):
    """Ragged heads whose scores come from queries and live in a column: attention mass summed over all rows."""

    name: ClassVar[str] = "votes_by_head"
    summary: ClassVar[str] = "a test: ragged heads, column of attention mass"
    needs_queries: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("mass",)

    def observe(self, observation: Observation) -> None:
        observation.columns["mass"].add_(observation.grouped_mass(observation.rows, "mean"))

    def score(self, observation: Observation) -> Tensor:
        return observation.columns["mass"]


@dataclass(frozen=True)
class Scored(EvictionPolicy):
    """Scores by a function of `[batch, kv_heads, slots]` positions, for scores that no method would give."""

    name: ClassVar[str] = "scored"
    summary: ClassVar[str] = "a test: any scores"
    paper: ClassVar[str] = "none"

    function: Callable[[Tensor], Tensor] = torch.zeros_like

    def score(self, observation: Observation) -> Tensor:
        return self.function(observation.positions).float()
