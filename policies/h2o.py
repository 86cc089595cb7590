"""H2O: what has received the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvpress.policies.base import EvictionPolicy, check_share, share_of
from kvpress.policies.token_rule import TokenRule

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class H2O(EvictionPolicy):
    """Keeps the last tokens and the heavy hitters: those with the most attention, summed over all queries so far.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv
    2306.14048. Every row of a prompt and every decoded row counts, per KV head (mean over its query heads); what is
    evicted is gone, survivors keep their sums.

    Args:
        budget: tokens kept per KV head, recent ones included.
        recent: share of the budget that the last tokens take, rounded down; the rest is for heavy hitters.
        normalize: divide a token's sum by the number of queries that could see it. Early tokens have more summands;
            this evens it out.
        decay: factor in (0, 1] by which the sums fade with every query. `None`: they do not.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "the last tokens and those with the most attention so far"
    paper: ClassVar[str] = "arXiv 2306.14048"
    fails: ClassVar[str] = (
        "long contexts: early tokens had more queries to collect weight from; a question counts as little as any text"
    )
    needs: ClassVar[str] = "all queries"
    needs_queries: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("attention",)

    recent: float = 0.5
    normalize: bool = False
    decay: float | None = None

    def __post_init__(self) -> None:
        check_share(self.name, "recent", self.recent)
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize of {self.name} must be True or False, got {self.normalize!r}")
        if self.decay is not None:
            check_share(self.name, "decay", self.decay)
            if self.decay == 0:
                raise ValueError(f"decay of {self.name} must be in (0, 1] or None, got {self.decay!r}")
        super().__post_init__()

    @property
    def weights_reduction(self) -> str | None:
        return "mean" if self.decay is None else None  # with decay each row has a weight of its own

    def protected_window(self, budget: int) -> int:
        return share_of(self.recent, budget)

    @property
    def token_rule(self) -> TokenRule | None:
        return TokenRule("attention") if self.decay is None and not self.normalize else None

    def observe(self, observation: Observation) -> None:
        column = observation.columns["attention"]
        if self.decay is None:
            column.add_(observation.grouped_mass(observation.rows, "mean"))
            return
        positions = observation.query_positions
        if positions is None:
            raise ValueError(f"decay of {self.name} needs the positions of the query rows")
        newest = observation.newest if isinstance(observation.newest, int) else observation.newest[:, 0]
        weights = self.decay ** (newest - positions).float()
        fed = (positions >= 0).sum(dim=-1)[:, None, None]
        column.mul_(self.decay**fed).add_(observation.grouped_mass(observation.rows, "mean", row_weights=weights))

    def score(self, observation: Observation) -> Tensor:
        score = observation.columns["attention"]
        if not self.normalize:
            return score
        queries = (observation.newest - observation.positions + 1).float()
        if self.decay is None or self.decay == 1:
            return score / queries
        return score / ((1 - self.decay**queries) / (1 - self.decay))
