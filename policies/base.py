"""What every policy is: an immutable description of a method, that layers ask for scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from kvpress.policies.budget import Budget, BudgetValue

if TYPE_CHECKING:
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
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a parameter that the policy does not have.
        """
        given = {key: value for key, value in data.items() if key != "name"}
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"{cls.name} has no parameter {key!r}; it has {known}")
        return cls(**given)


@dataclass(frozen=True)
class EvictionPolicy(Policy):
    """Decides which tokens stay. A subclass gives scores; budgets, sinks, windows, ties and padding are handled here and in the layer.

    Args:
        budget: tokens kept per KV head of a layer, sinks and window included (`kvpress.policies.budget`); `None` keeps all.
    """

    kind: ClassVar[str] = "eviction"
    columns: ClassVar[tuple[str, ...]] = ()  # fp32 columns kept per slot, 0 for a new token
    needs_queries: ClassVar[bool] = False  # the attention function must hand over query rows

    budget: BudgetValue | None

    def __post_init__(self) -> None:
        if self.budget is None:
            return
        tokens = Budget.parse(self.budget).tokens
        required = self.protected_sinks + max(self.protected_window, 1)
        if tokens is not None and tokens < required:
            raise ValueError(
                f"budget of {self.name} must be at least {required} "
                f"(sinks={self.protected_sinks} + window={max(self.protected_window, 1)}), got {tokens}"
            )

    @property
    def protected_sinks(self) -> int:
        """Tokens at the beginning of a sequence that are never evicted."""
        return 0

    @property
    def protected_window(self) -> int:
        """Last tokens of a sequence that are never evicted."""
        return 0

    def observe(self, observation: Observation) -> None:
        """Update this policy's columns after a forward. Called after every forward when the policy has columns."""

    def score(self, observation: Observation) -> Tensor:
        """Scores `[batch, kv_heads or 1, slots]`, fp32, higher = keep. Called when a budget is exceeded.

        Sinks and window need no care here, nor do empty slots; NaN counts as the lowest score, ties keep the larger position.
        """
        raise NotImplementedError

    def allocate(self, observation: Observation, budgets: Sequence[int]) -> Sequence[int] | Sequence[Sequence[int]]:
        """Tokens for this layer after a prompt, from the resolved budget of each batch row: one number a row, or one a KV head.

        Called after each forward of more than one token; the default gives every layer and head the same.
        """
        return budgets


def check_integer(policy: str, field: str, value: object, minimum: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{field} of {policy} must be an integer >= {minimum}, got {value!r}")


def check_choice(policy: str, field: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{field} of {policy} must be one of {list(choices)}, got {value!r}")
