"""Keyformer: what keeps receiving attention when the scores are shaken."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from kvpress.policies.base import EvictionPolicy, check_choice, check_integer, check_share, share_of
from kvpress.policies.token_rule import TokenRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpress.observation import Observation

STEPS = 128  # new tokens of the published runs
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Keyformer(EvictionPolicy):
    """Keeps the last tokens and the key tokens: those with the most attention under Gumbel noise, over all queries.

    Adnan et al., "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference", arXiv
    2403.09054. Every row of a prompt and every decoded row adds `softmax((scores + noise) / temperature)`, per KV head
    (mean over its query heads). Noise and temperature only choose; attention itself is plain. Each token that leaves
    the window competes with the key tokens so far. Without noise and at temperature 1 this is H2O.

    Noise is drawn anew for every pair of row and key, as a function of seed, layer, head and positions: it depends
    neither on chunks nor on batch mates. Prompts have temperature `tau_init`; from there it rises in equal steps to
    `tau_end` at the last of `steps` decoded tokens, and stays; each prompt starts it anew.

    Args:
        budget: tokens kept per KV head, recent ones included.
        recent: share of the budget that the last tokens take, rounded down; the rest is for key tokens.
        tau_init, tau_end: temperatures.
        noise: `"gumbel"` or `None`.
        seed: of the noise.
        steps: tokens to be decoded. A cache cannot see the `max_new_tokens` of a call to `generate`; pass the same
            number here. `None`: the `max_new_tokens` of the model's generation configuration, where set, else 128.
    """

    name: ClassVar[str] = "keyformer"
    summary: ClassVar[str] = "the last tokens and those with the most attention under noise"
    paper: ClassVar[str] = "arXiv 2403.09054"
    fails: ClassVar[str] = "as H2O; the noise costs accuracy at budgets that H2O just manages"
    needs: ClassVar[str] = "all queries"
    needs_queries: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("attention",)

    recent: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    noise: str | None = "gumbel"
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        check_share(self.name, "recent", self.recent)
        for field, value in (("tau_init", self.tau_init), ("tau_end", self.tau_end)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"{field} of {self.name} must be a number above 0, got {value!r}")
        if self.noise is not None:
            check_choice(self.name, "noise", self.noise, ["gumbel"])
        check_integer(self.name, "seed", self.seed, 0)
        if self.steps is not None:
            check_integer(self.name, "steps", self.steps, 1)
        super().__post_init__()

    def for_model(self, model: PreTrainedModel) -> Self:
        """With `steps` of the model's generation configuration, where none are given."""
        configuration = getattr(model, "generation_config", None)
        known = getattr(configuration, "max_new_tokens", None)
        return self if self.steps is not None or not known else replace(self, steps=known)

    @property
    def plain(self) -> bool:
        """Neither noise nor temperature: scores are the model's own attention weights, as in H2O."""
        return self.noise is None and self.tau_init == self.tau_end == 1

    @property
    def weights_reduction(self) -> str | None:
        return "mean" if self.plain else None

    def protected_window(self, budget: int) -> int:
        return share_of(self.recent, budget)

    @property
    def token_rule(self) -> TokenRule | None:
        return TokenRule("attention") if self.plain else None

    def observe(self, observation: Observation) -> None:
        column, rows, decoded = observation.columns["attention"], observation.rows, observation.decoded
        if decoded == 0 or rows == 1:
            column.add_(self._mass(observation, rows, self.temperature(decoded)))
            return
        for left in range(rows, 0, -1):  # several decoded at once, each row at its own temperature
            first = torch.zeros(1, left, device=column.device)
            first[0, 0] = 1
            column.add_(self._mass(observation, left, self.temperature(decoded - left + 1), first))

    def score(self, observation: Observation) -> Tensor:
        return observation.columns["attention"]

    def temperature(self, decoded: int) -> float:
        """At the `decoded`-th token after a prompt; 0 is the prompt."""
        steps = self.steps or STEPS
        return self.tau_init + min(decoded, steps) / steps * (self.tau_end - self.tau_init)

    def noise_seed(self, layer: int) -> int | None:
        """Seed of the noise in a layer, below 2^63."""
        return None if self.noise is None else (self.seed + (layer + 1) * GOLDEN) % 2**63

    def _mass(
        self, observation: Observation, rows: int, temperature: float, row_weights: Tensor | None = None
    ) -> Tensor:
        if self.plain and row_weights is None:
            return observation.grouped_mass(rows, "mean")
        return observation.grouped_mass(
            rows,
            "mean",
            temperature=temperature,
            noise_seed=self.noise_seed(observation.layer),
            row_weights=row_weights,
        )
