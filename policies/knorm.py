"""KNorm: keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvpress.policies.base import EvictionPolicy

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class KNorm(EvictionPolicy):
    """Keeps, per KV head, the keys with the smallest L2 norm: they receive much attention, whatever the query.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.

    Args:
        budget: tokens kept per KV head.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "the keys of smallest norm"
    paper: ClassVar[str] = "arXiv 2406.11430"
    fails: ClassVar[str] = "models in which small keys do not go with attention; small budgets"
    needs: ClassVar[str] = "keys"
    columns: ClassVar[tuple[str, ...]] = ("key_norm",)

    def observe(self, observation: Observation) -> None:
        observation.set_new("key_norm", observation.new_keys.float().norm(dim=-1))

    def score(self, observation: Observation) -> Tensor:
        return -observation.columns["key_norm"]
