"""PyramidKV: SnapKV with more tokens for the lower layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpress.policies.base import check_integer
from kvpress.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's votes under budgets that fall in a straight line from the first layer to the last.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.
    Beside the window the last layer gets `1 / beta` of the mean, and the first what that leaves over; no layer gets
    more than the prompt has. Prompts shorter than twice the mean are cut alike in all layers.

    The layers' budgets add up to `layers * budget` exactly. (The published rule rounds the step between layers down,
    which gives each layer up to `(layers - 2) / 2` tokens more than was asked for. Where its division is exact, the two
    agree.)

    Args:
        budget: mean tokens kept per KV head of a layer, window included.
        beta: the larger, the steeper; 1 gives all layers the same.
        window, kernel_size, pooling, group_reduce: as in SnapKV.
    """

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "as SnapKV, with more tokens for the lower layers"
    paper: ClassVar[str] = "arXiv 2406.02069"
    fails: ClassVar[str] = (
        "models whose upper layers look widely; small budgets, where the upper layers are left with little"
    )

    shares_out: ClassVar[str | None] = "layers"

    beta: int = 20

    def __post_init__(self) -> None:
        check_integer(self.name, "beta", self.beta, 1)
        super().__post_init__()

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> list[int]:
        return [
            self._layer_budget(budget, seen, observation.ordinal, observation.layers)
            for budget, seen in zip(budgets, observation.seen, strict=True)
        ]

    def _layer_budget(self, budget: int, tokens: int, ordinal: int, layers: int) -> int:
        mean = budget - self.window
        if mean <= 0 or layers == 1 or tokens < budget or tokens < 2 * mean:
            return budget
        lowest = mean // self.beta
        highest = 2 * mean - lowest
        if highest >= tokens - self.window:
            highest = tokens - self.window
            lowest = 2 * mean - highest
        steps = layers - 1
        fall = highest - lowest
        line = [highest - layer * fall // steps for layer in range(layers)]  # rounded up where it is not whole
        rounded = [layer for layer in range(layers) if layer * fall % steps]
        surplus = sum(line) - layers * mean
        return self.window + line[ordinal] - (ordinal in rounded[len(rounded) - surplus :])
