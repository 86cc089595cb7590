"""Random: a seeded draw, the floor that any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvpress.policies.base import EvictionPolicy, check_integer

if TYPE_CHECKING:
    from kvpress.observation import Observation


@dataclass(frozen=True)
class Random(EvictionPolicy):
    """Keeps a random set of tokens per layer and KV head.

    A token's score is a hash of seed, layer, KV head and position, so the kept set depends neither on chunks nor on batch mates.

    Args:
        budget: tokens kept per KV head.
        seed: of the hash.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "a seeded random set"
    paper: ClassVar[str] = "none: the floor for comparisons"
    fails: ClassVar[str] = "every question about something particular; it is a floor, not a choice"

    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.name, "seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed of {self.name} must be below 2^63, got {self.seed}")
        super().__post_init__()

    def score(self, observation: Observation) -> Tensor:
        positions = observation.positions.long()
        first = observation.heads.first(positions.shape[1])
        heads = torch.arange(first, first + positions.shape[1], device=positions.device)[None, :, None]
        stream = mix(mix(torch.tensor(self.seed, device=positions.device)) + observation.layer * 65_537 + heads)
        return (mix(stream + positions) & 0xFFFFFF).float()


def mix(value: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64: every input bit changes every output bit."""
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
