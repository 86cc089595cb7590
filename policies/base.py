"""What every policy is: an immutable description of a method, that layers ask for scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from kvpress.policies.budget import Budget, BudgetValue

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpress.observation import Observation


@dataclass(frozen=True)
class Policy:
    """A method and its parameters. Immutable: all state lives in the cache."""

    kind: ClassVar[str]  # "eviction" or "selection"
    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str] = "nothing"  # what it must be given, for tables

    def to_dict(self) -> dict[str, Any]:
        """The registered name and the parameters, as JSON types."""
        values = asdict(self)
        return {"name": self.name, **{field.name: values[field.name] for field in fields(self) if field.init}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a parameter that the policy does not have.
        """
        given = {key: value for key, value in data.items() if key != "name"}
        known = [field.name for field in fields(cls) if field.init]
        for key in given:
            if key not in known:
                raise ValueError(f"{cls.name} has no parameter {key!r}; it has {known}")
        return cls(**given)


@dataclass(frozen=True)
class EvictionPolicy(Policy):
    """Decides which tokens stay. A subclass gives scores; budgets, sinks, windows, ties and padding are handled here and in the layer.

    Args:
        budget: tokens kept per KV head of a layer, sinks and window included (`kvpress.policies.budget`); `None` keeps all.
        interval: evict in bursts: a head is cut back to its budget when it holds `interval` tokens more, and not before.
            Between bursts a decoded token costs no ranking; memory for `interval - 1` tokens more is held.
    """

    kind: ClassVar[str] = "eviction"
    columns: ClassVar[tuple[str, ...]] = ()  # fp32 columns kept per slot, 0 for a new token
    same_for_all_heads: ClassVar[bool] = False  # KV heads of a layer keep the same tokens
    same_in_all_layers: ClassVar[bool] = False  # and so do layers
    needs_queries: ClassVar[bool] = False  # the attention function must hand over query rows
    needs_token_ids: ClassVar[bool] = False  # the model must be called with input_ids
    recounts: ClassVar[bool] = False  # `allocate` counts what is held: ask again when its limit is reached

    budget: BudgetValue | None
    interval: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_integer(self.name, "interval", self.interval, 1)
        if self.budget is None:
            return
        tokens = Budget.parse(self.budget).tokens
        if tokens is None:
            return
        window = max(self.protected_window(tokens), 1)
        if tokens < self.protected_sinks + window:
            raise ValueError(
                f"budget of {self.name} must be at least {self.protected_sinks + window} "
                f"(sinks={self.protected_sinks} + window={window}), got {tokens}"
            )

    def for_model(self, model: PreTrainedModel) -> Self:
        """This policy with what it can learn from the model that it will serve."""
        return self

    @property
    def reindexes(self) -> bool:
        """Attention runs over positions 0 … n-1 of what is kept."""
        return False

    @property
    def protected_sinks(self) -> int:
        """Tokens at the beginning of a sequence that are never evicted."""
        return 0

    def protected_window(self, budget: int) -> int:
        """Last tokens of a sequence that are never evicted by a head that keeps `budget` tokens."""
        return 0

    def observe(self, observation: Observation) -> None:
        """Update this policy's columns after a forward. Called after every forward when the policy has columns."""

    def score(self, observation: Observation) -> Tensor:
        """Scores `[batch, kv_heads or 1, slots]`, fp32, higher = keep. Called when a budget is exceeded.

        Sinks and window need no care here, nor do empty slots; NaN counts as the lowest score, ties keep the larger position.
        """
        raise NotImplementedError

    def discards(self, observation: Observation) -> Tensor | None:
        """`[batch, kv_heads or 1, slots]` bool: tokens that go with the next eviction even where the budget leaves room for them.

        Sinks and window need no care here.
        """
        return None

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> Sequence[int] | Sequence[Sequence[int]]:
        """Tokens for this layer after a prompt, from the resolved budget of each batch row: one number a row, or one a KV head.

        Called after each forward of more than one token; the default gives every layer and head the same.
        """
        return budgets


def check_integer(policy: str, field: str, value: object, minimum: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{field} of {policy} must be an integer >= {minimum}, got {value!r}")


def check_share(policy: str, field: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{field} of {policy} must be a share in [0, 1], got {value!r}")


def share_of(share: float, tokens: int) -> int:
    """`share * tokens` rounded down, as exact arithmetic would."""
    return math.floor(share * tokens + 1e-9)


def check_choice(policy: str, field: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{field} of {policy} must be one of {list(choices)}, got {value!r}")
