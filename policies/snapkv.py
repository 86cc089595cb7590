"""SnapKV: what the last tokens of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvpress.policies.base import EvictionPolicy, check_choice, check_integer
from kvpress.policies.token_rule import TokenRule

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class SnapKV(EvictionPolicy):
    """The last `window` tokens of a prompt vote with their attention weights for the tokens before them; clusters of votes survive.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. Votes are reduced over the query heads
    of a KV head, then pooled over neighbouring positions.

    The paper evicts once, after the prompt. Here the budget also holds afterwards, by the same rule continued: a forward of `r` tokens
    adds the votes of its last `min(r, window)` rows, and earlier votes fade by `1 - min(r, window) / window`. A prompt, a chunk or a turn
    of at least `window` tokens therefore votes anew; a decoded token adds one row (not pooled: pooling is for prompts).

    Args:
        budget: tokens kept per KV head, window included.
        window: last tokens, which vote and are never evicted.
        kernel_size: width of the pooling, odd.
        pooling: `"max"` or `"avg"`.
        group_reduce: `"mean"`, `"max"` or `"sum"` over the query heads of a KV head.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "what the last tokens of the prompt attend to, with their neighbours"
    paper: ClassVar[str] = "arXiv 2404.14469"
    fails: ClassVar[str] = (
        "the question is not at the end of what is compressed; what later tokens need, no earlier one asked for"
    )
    needs: ClassVar[str] = "the last `window` queries"
    needs_queries: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("votes",)

    window: int = 32
    kernel_size: int = 7
    pooling: str = field(default="max", kw_only=True)
    group_reduce: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        check_integer(self.name, "window", self.window, 1)
        check_integer(self.name, "kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of {self.name} must be odd, got {self.kernel_size}")
        check_choice(self.name, "pooling", self.pooling, ["max", "avg"])
        check_choice(self.name, "group_reduce", self.group_reduce, ["mean", "max", "sum"])
        super().__post_init__()

    @property
    def weights_reduction(self) -> str | None:
        return self.group_reduce

    def protected_window(self, budget: int) -> int:
        return self.window

    @property
    def token_rule(self) -> TokenRule:
        return TokenRule("votes", fade=1 - 1 / self.window)

    def observe(self, observation: Observation) -> None:
        rows = min(observation.rows, self.window)
        votes = observation.grouped_mass(rows=rows, reduce=self.group_reduce)
        if observation.rows > 1:
            inside = observation.in_window(self.window)
            votes = votes.where(
                inside, self._pool(votes.masked_fill(inside, 0))
            )  # only what lies before the window is pooled
        observation.columns["votes"].mul_(1 - rows / self.window).add_(votes)

    def score(self, observation: Observation) -> Tensor:
        return observation.columns["votes"]

    def _pool(self, votes: Tensor) -> Tensor:
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        flat = votes.flatten(0, 1).unsqueeze(1)
        return pool(flat, self.kernel_size, stride=1, padding=self.kernel_size // 2).view_as(votes)
