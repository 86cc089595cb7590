"""MorphKV: what the last queries attend to, looked at afresh with every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvpress.policies.base import EvictionPolicy, check_choice, check_integer

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class MorphKV(EvictionPolicy):
    """Keeps the last `window` tokens, and of the older ones those to which the last `window` queries attend.

    Ghadia et al., "Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs", arXiv 2503.00979.
    Weights are a softmax over the older tokens alone, of scores summed over the query heads of a KV head (before any
    soft cap), and they are made anew whenever something must go: an old favourite that nobody looks at any more
    leaves. A prompt is cut by the same rule at its end. A layer holds the last `window` queries, summed per KV head.

    Args:
        budget: tokens kept per KV head, window included.
        window: last tokens, which vote and are never evicted.
        fuse: `"sum"` or `"max"` of an older token's weights over the voting queries.
    """

    name: ClassVar[str] = "morphkv"
    summary: ClassVar[str] = "what the last tokens attend to, ranked anew at every step"
    paper: ClassVar[str] = "arXiv 2503.00979"
    fails: ClassVar[str] = "query-agnostic compression: the last tokens of the context, not the question, choose"
    needs: ClassVar[str] = "the last `window` queries"
    needs_queries: ClassVar[bool] = True

    window: int = 32
    fuse: str = "sum"

    def __post_init__(self) -> None:
        check_integer(self.name, "window", self.window, 1)
        check_choice(self.name, "fuse", self.fuse, ["sum", "max"])
        super().__post_init__()

    @property
    def recent_queries(self) -> int:
        return self.window

    def protected_window(self, budget: int) -> int:
        return self.window

    def score(self, observation: Observation) -> Tensor:
        older = ~observation.in_window(self.window)
        weights = observation.recent_scores(older).softmax(dim=-1).nan_to_num(nan=0.0)  # a row that sees nothing
        return weights.sum(dim=2) if self.fuse == "sum" else weights.amax(dim=2)
