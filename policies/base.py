"""What every policy is: an immutable description of a method, that layers ask for scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from kvpress.policies.budget import Budgets, frozen_budgets, token_budgets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpress.observation import Observation
    from kvpress.policies.token_rule import TokenRule


@dataclass(frozen=True)
class Policy:
    """A method and its parameters. Immutable: all state lives in the cache."""

    kind: ClassVar[str]  # "eviction" or "selection"
    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str] = "nothing"  # what it must be given, for tables
    fails: ClassVar[str] = ""  # when not to use it, for its page

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
                selects = key == "budget" and cls.kind == "selection"
                instead = f": it keeps every token, and attends to {known[0]}" if selects else ""
                raise ValueError(f"{cls.name} has no parameter {key!r}{instead}; it has {known}")
        return cls(**given)


@dataclass(frozen=True)
class EvictionPolicy(Policy):
    """Decides which tokens stay. A subclass gives scores; budgets, sinks, windows, ties and padding are handled here and in the layer.

    Args:
        budget: tokens kept per KV head of a layer, sinks and window included (`kvpress.policies.budget`); `None` keeps all.
            A tuple gives each compressed layer its own; an entry that is a tuple gives each KV head its own.
        interval: evict in bursts: a head is cut back to its budget when it holds `interval` more, and not before.
            Between bursts a decoded token costs no ranking; memory for `interval - 1` tokens more is held.
    """

    kind: ClassVar[str] = "eviction"
    columns: ClassVar[tuple[str, ...]] = ()  # fp32 columns kept per slot, 0 for a new token
    same_for_all_heads: ClassVar[bool] = False  # KV heads of a layer keep the same tokens, given equal budgets
    same_in_all_layers: ClassVar[bool] = False  # and so do layers
    needs_queries: ClassVar[bool] = False  # the attention function must hand over query rows
    needs_token_ids: ClassVar[bool] = False  # the model must be called with input_ids
    needs_values: ClassVar[bool] = False  # observations show the values of all slots
    recounts: ClassVar[bool] = False  # `allocate` counts what is held: ask again when its limit is reached

    shares_out: ClassVar[str | None] = None  # "layers" or "heads": `allocate` divides a mean budget among them

    budget: Budgets | None
    interval: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_integer(self.name, "interval", self.interval, 1)
        if self.budget is None:
            return
        object.__setattr__(self, "budget", frozen_budgets(self.budget))
        self._check_shape()
        for tokens in token_budgets(self.budget):
            window = max(self.protected_window(tokens), 1)
            if tokens < self.protected_sinks + window:
                raise ValueError(
                    f"budget of {self.name} must be at least {self.protected_sinks + window} "
                    f"(sinks={self.protected_sinks} + window={window}), got {tokens}"
                )

    def _check_shape(self) -> None:
        """What the policy shares out itself cannot be given."""
        if (self.shares_out == "layers" and self.budgets_by_layer) or (self.shares_out and self.budgets_by_head):
            raise ValueError(
                f"budget of {self.name} must be one number for all {self.shares_out}, it shares it out itself, got {self.budget!r}"
            )

    @property
    def budgets_by_layer(self) -> bool:
        """Each layer has a budget of its own."""
        return isinstance(self.budget, tuple)

    @property
    def budgets_by_head(self) -> bool:
        """The KV heads of some layer have budgets of their own."""
        return isinstance(self.budget, tuple) and any(isinstance(entry, tuple) for entry in self.budget)

    @property
    def heads_agree(self) -> bool:
        """All KV heads of a layer keep the same tokens."""
        return self.same_for_all_heads and not self.budgets_by_head

    @property
    def layers_agree(self) -> bool:
        """All layers keep the same tokens."""
        return self.same_in_all_layers and not self.budgets_by_layer

    def for_model(self, model: PreTrainedModel) -> Self:
        """This policy with what it can learn from the model that it will serve."""
        return self

    @property
    def reindexes(self) -> bool:
        """Attention runs over positions 0 … n-1 of what is kept."""
        return False

    @property
    def recent_queries(self) -> int:
        """Query rows that a layer keeps for `Observation.recent_scores`."""
        return 0

    @property
    def weights_reduction(self) -> str | None:
        """How this policy reduces the softmax weights of a decoded token over the query heads of a KV head (`"mean"`, `"max"` or `"sum"`):
        attention then hands them over with its output. `None`: it does not ask for them at every token."""
        return None

    @property
    def protected_sinks(self) -> int:
        """Tokens at the beginning of a sequence that are never evicted."""
        return 0

    def protected_window(self, budget: int) -> int:
        """Last tokens of a sequence that are never evicted by a head that keeps `budget` tokens."""
        return 0

    @property
    def token_rule(self) -> TokenRule | None:
        """What `observe` and `score` do with a decoded token, where a rule can say it: compiled kernels then do it without asking them."""
        return None

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
        """Tokens for this layer after a prompt, from the resolved budget of each batch row: one number a row, or one a KV head
        (of all of the model's, where processes share them: `observation.heads`).

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
