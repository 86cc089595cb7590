"""TOVA: what the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvpress.policies.base import EvictionPolicy

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class TOVA(EvictionPolicy):
    """After every forward, keeps the tokens with the largest attention weight of the last query, averaged over all query heads.

    Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104. One set for all KV heads of a layer; no token is protected,
    not even the newest.

    Args:
        budget: tokens kept per KV head.
    """

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "what the last query attends to"
    paper: ClassVar[str] = "arXiv 2401.06104"
    fails: ClassVar[str] = (
        "a last token that looks elsewhere (a newline, a template's end); what leaves never comes back"
    )
    same_for_all_heads: ClassVar[bool] = True
    needs: ClassVar[str] = "the last query"
    needs_queries: ClassVar[bool] = True

    @property
    def weights_reduction(self) -> str | None:
        return "mean"

    def score(self, observation: Observation) -> Tensor:
        mean = observation.grouped_mass(rows=1, reduce="mean").mean(dim=1, keepdim=True)
        return observation.heads.sum(mean) / observation.heads.size
